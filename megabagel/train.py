"""Train or fine-tune: `python -m megabagel.train --config FILE [--group.key value ...]`, alone or under torchrun."""

from megabagel.checkpoint.errors import CheckpointError
from megabagel.config.checks import ConfigError, check_config
from megabagel.config.load import load_config, to_yaml
from megabagel.data.faults import DataError
from megabagel.models.autoencoder import AutoencoderError
from megabagel.runtime import distributed, failure
from megabagel.runtime.give_up import GiveUp


def main(argv: list[str] | None = None) -> None:
    """What the configuration and the headers of its files can tell is checked before any rank allocates memory."""
    with failure.guard(ConfigError, DataError, CheckpointError, AutoencoderError, GiveUp):
        config = load_config(argv)
        check_config(config, distributed.world_size())
        layout = distributed.initialize(config.parallel, config.training.seed)
        if layout.rank == 0:
            print(to_yaml(config), flush=True)
        from megabagel.checkpoint.lock import own  # after the device is chosen
        from megabagel.training.setup import build_trainer

        with own(config.checkpoint.run_dir, layout.rank):
            build_trainer(config, layout).run()
        distributed.destroy()


if __name__ == "__main__":
    main()
