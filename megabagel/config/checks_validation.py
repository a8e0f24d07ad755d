"""Rules about `config.validation` itself; the files that it names are checked in `checks_files.py`."""

from collections.abc import Iterator

from megabagel.config.schema import Config


def validation_faults(config: Config) -> Iterator[str]:
    """Faults in order of importance."""
    validation = config.validation
    for name in ("interval", "seed"):
        if (value := getattr(validation, name)) < 0:
            yield f"validation.{name} is {value}, but must not be negative."
    for name in ("packs", "patience"):
        if (value := getattr(validation, name)) is not None and value < 1:
            yield f"validation.{name} is {value}, but must be greater than 0."
    checkpoint = config.checkpoint
    if validation.interval == 0:
        for name, value in (
            ("validation.patience", validation.patience),
            ("checkpoint.keep_best", checkpoint.keep_best),
        ):
            if value is not None:
                yield (
                    f"{name} is {value}, but validation.interval 0 means that nothing is ever validated; set the "
                    f"interval in steps, or {name} to null."
                )
        return
    if validation.dataset_config_file is None:
        yield (
            f"validation.interval is {validation.interval}, but validation.dataset_config_file is not set; give a YAML "
            "file with the groups of held-out data, or set the interval to 0."
        )
    if validation.weights != "model" and config.optimizer.ema_decay is None:
        yield (
            f"validation.weights is {validation.weights}, but optimizer.ema_decay null keeps no moving average; set "
            "a decay, or weights to model."
        )
    if checkpoint.keep_best is not None and checkpoint.save_interval % validation.interval:
        yield (
            f"checkpoint.save_interval {checkpoint.save_interval} is not a multiple of validation.interval "
            f"{validation.interval}, so that checkpoint.keep_best {checkpoint.keep_best} would not know how good every "
            "checkpoint is; make it one, or set keep_best to null."
        )
