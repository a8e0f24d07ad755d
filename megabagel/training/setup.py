"""Puts a run together on one rank: model, weights, optimizer, data, autoencoder; continues a run if there is one."""

from pathlib import Path

from megabagel.checkpoint import distributed as checkpoint
from megabagel.checkpoint import integrity, space
from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.hf import load_weights, open_source
from megabagel.checkpoint.local import LocalStore
from megabagel.config.folder import is_checkpoint
from megabagel.config.paths import autoencoder_path
from megabagel.config.precision import rows_per_tile
from megabagel.config.schema import Config
from megabagel.data.broadcast import ReplicaReader
from megabagel.models.autoencoder import load_autoencoder
from megabagel.models.bagel import Bagel
from megabagel.models.build import DTYPES, build_stages
from megabagel.models.vision import is_frozen
from megabagel.packing.planner import fixed_length
from megabagel.runtime.distributed import Layout
from megabagel.runtime.progress import Progress
from megabagel.training import held_out
from megabagel.training.ema import ShardedEma
from megabagel.training.encode import Encoder
from megabagel.training.loop import Trainer
from megabagel.training.optimizer import build_optimizer
from megabagel.training.readers import Sources
from megabagel.training.samples import Sampling
from megabagel.training.stopping import Stop
from megabagel.training.validation import Validation
from megabagel.training.wrap import wrap_empty


def _fill(stages: list[Bagel], config: Config) -> None:
    """Initial weights; the checkpoint that they come from is verified."""
    source = open_source(config)
    wanted = config.checkpoint
    if wanted.verify and wanted.init_from and is_checkpoint(Path(wanted.init_from)):
        integrity.require(source.folder)
    load_weights(stages, source)
    source.close()


def build_trainer(
    config: Config, layout: Layout, stop: Stop | None = None, progress: Progress | None = None
) -> Trainer:
    """A trainer ready to run, at the step of the run folder's newest checkpoint or at step 0. `stop` may end it early;
    `progress` is told how far it is.

    Initial weights are read in the second case only, and only when parameters are where they will stay. Raises
    CheckpointError, DataError, AutoencoderError and ConfigError.
    """
    run_dir, local_dir = config.checkpoint.run_dir, config.checkpoint.local_dir
    local = LocalStore.open(local_dir, run_dir) if local_dir else None
    resumes = config.checkpoint.auto_resume and checkpoint.exists(run_dir, local)
    stages = build_stages(config, layout.device)
    vision = stages[0].vision if is_frozen(config.model) else None
    models, stages = stages, wrap_empty(stages, config.parallel)
    if not resumes:
        _fill(models, config)
    optimizer = build_optimizer(config.optimizer, config.training, config.parallel, stages)
    ema = ShardedEma(optimizer) if config.optimizer.ema_decay is not None else None
    autoencoder = None
    if config.model.visual_gen:
        autoencoder = load_autoencoder(autoencoder_path(config)).to(layout.device, DTYPES[config.training.params_dtype])
    tile = rows_per_tile(config.kernels) * layout.tp_size * layout.cp_size
    rows = fixed_length(config.data.max_num_tokens, tile)
    # between pipeline stages a tensor of one length travels; without them padding to it would be wasted work
    total_length = rows if layout.pp_size > 1 else None
    sources = Sources(config, layout, tile, total_length, autoencoder, vision)
    reader = ReplicaReader(sources.open_training, layout.replica_group, layout.source_rank)
    encoder = Encoder(config, layout, autoencoder, vision)
    validation = None
    if config.validation.interval > 0:
        held_out_reader = ReplicaReader(sources.open_held_out, layout.replica_group, layout.source_rank)
        held_out_encoder = Encoder(held_out.held_out_config(config, layout.dp_size), layout, autoencoder, vision)
        validation = Validation(config, layout, stages, ema, held_out_reader, held_out_encoder, rows)
    sampling = Sampling(config, layout, stages, ema, autoencoder) if config.samples.interval > 0 else None
    trainer = Trainer(
        config=config,
        layout=layout,
        stages=stages,
        optimizer=optimizer,
        ema=ema,
        reader=reader,
        encoder=encoder,
        rows=rows,
        validation=validation,
        sampling=sampling,
        local=local,
        stop=stop,
        progress=progress or Progress(),
    )
    if resumes and not trainer.resume():
        raise CheckpointError(
            f"no checkpoint of {run_dir} in {local_dir} can be read; delete that folder to start over"
        )
    if config.checkpoint.save_interval and trainer.step < config.training.train_steps:
        space.check(config.checkpoint.run_dir, optimizer, ema is not None)
    return trainer
