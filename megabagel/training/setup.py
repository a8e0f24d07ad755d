"""Puts a run together on one rank: model, weights, optimizer, data, autoencoder; continues a run if there is one."""

import logging
from functools import partial
from pathlib import Path

from megabagel.checkpoint import distributed as checkpoint
from megabagel.checkpoint import integrity, space
from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.hf import load_weights, open_source
from megabagel.checkpoint.local import LocalStore
from megabagel.config.datasets import GroupConfig, load_dataset_groups
from megabagel.config.folder import is_checkpoint
from megabagel.config.paths import autoencoder_path, tokenizer_path
from megabagel.config.precision import rows_per_tile
from megabagel.config.schema import Config
from megabagel.data.broadcast import ReplicaReader
from megabagel.data.faults import FAULTS_FILE, DataError
from megabagel.data.reader import Reader
from megabagel.data.stored import StoredLatents, stored_kinds
from megabagel.data.text import Tokenizer
from megabagel.models.autoencoder import Autoencoder, load_autoencoder
from megabagel.models.bagel import Bagel
from megabagel.models.build import DTYPES, build_stages
from megabagel.models.vision import VisionTower, is_frozen
from megabagel.packing.cost import CostModel
from megabagel.packing.geometry import geometry_of
from megabagel.packing.planner import fixed_length
from megabagel.runtime.distributed import Layout, gather_objects
from megabagel.training import held_out
from megabagel.training.cost_model import cost_model
from megabagel.training.ema import ShardedEma
from megabagel.training.encode import Encoder
from megabagel.training.loop import Trainer
from megabagel.training.optimizer import build_optimizer
from megabagel.training.stored import check_stored
from megabagel.training.validation import Validation
from megabagel.training.wrap import wrap_empty

logger = logging.getLogger(__name__)


def _open_reader(
    config: Config,
    layout: Layout,
    tile: int,
    total_length: int | None,
    autoencoder: Autoencoder | None,
    vision: VisionTower | None,
) -> Reader:
    """Of the training data, on the source rank of a replica. The encoders are those that what is stored of pictures
    must come from."""
    groups = load_dataset_groups(config.data.dataset_config_file)
    return _reader(config, layout, tile, total_length, autoencoder, vision, groups, FAULTS_FILE)


def _open_held_out(
    config: Config,
    layout: Layout,
    tile: int,
    total_length: int | None,
    autoencoder: Autoencoder | None,
    vision: VisionTower | None,
) -> Reader:
    """The same of the held-out data. `config`: of the run."""
    file = config.validation.dataset_config_file
    groups = held_out.held_out_groups(file)
    shared = held_out.shared_files(load_dataset_groups(config.data.dataset_config_file), groups)
    if shared and layout.dp_rank == 0:
        logger.warning(
            "held-out data %s: %d of its files are training data too, for example %s; what is measured there is how "
            "well the run remembers",
            file,
            len(shared),
            shared[0],
        )
    try:
        return _reader(
            held_out.held_out_config(config, layout.dp_size),
            layout,
            tile,
            total_length,
            autoencoder,
            vision,
            groups,
            held_out.FAULTS_FILE,
            config.validation.packs,
        )
    except DataError as error:
        raise DataError(f"held-out data {file}: {error}") from None


def _reader(
    config: Config,
    layout: Layout,
    tile: int,
    total_length: int | None,
    autoencoder: Autoencoder | None,
    vision: VisionTower | None,
    groups: dict[str, GroupConfig],
    faults_file: str,
    max_packs: int | None = None,
) -> Reader:
    tokenizer = Tokenizer(tokenizer_path(config))
    if len(tokenizer) > config.model.vocab_size:
        raise DataError(
            f"the tokenizer {tokenizer.folder} has {len(tokenizer)} tokens, more than model.vocab_size = "
            f"{config.model.vocab_size}; raise vocab_size or choose the model's own tokenizer."
        )
    check_stored(groups, autoencoder, vision)
    return Reader(
        config.data,
        groups,
        tokenizer,
        geometry_of(config.model, tokenizer.special),
        tile=tile,
        total_length=total_length,
        global_batch_size=config.training.global_batch_size,
        data_parallel_rank=layout.dp_rank,
        data_parallel_size=layout.dp_size,
        exchange=partial(gather_objects, layout.sources_group) if layout.dp_size > 1 else None,
        cost_model=_cost_model(config, groups) if config.data.packing == "balanced" else None,
        faults_file=Path(config.checkpoint.run_dir) / faults_file,
        visual_und=config.model.visual_und,
        visual_gen=config.model.visual_gen,
        known=[StoredLatents.open(group, features=is_frozen(config.model)) for group in groups.values()],
        max_packs=max_packs,
    )


def _cost_model(config: Config, groups: dict[str, GroupConfig]) -> CostModel:
    """Of samples whose pictures may be encoded already."""
    stored = {name: {kind for kind, *_ in stored_kinds(g.latents_dir)} for name, g in groups.items() if g.latents_dir}
    latents = [name for name, kinds in stored.items() if "vae_image" in kinds]
    features = [name for name, kinds in stored.items() if "vit_image" in kinds and is_frozen(config.model)]
    return cost_model(config.model, latents, features)


def _fill(stages: list[Bagel], config: Config) -> None:
    """Initial weights; the checkpoint that they come from is verified."""
    source = open_source(config)
    wanted = config.checkpoint
    if wanted.verify and wanted.init_from and is_checkpoint(Path(wanted.init_from)):
        integrity.require(source.folder)
    load_weights(stages, source)
    source.close()


def build_trainer(config: Config, layout: Layout) -> Trainer:
    """A trainer ready to run, at the step of the run folder's newest checkpoint or at step 0.

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
    reader = ReplicaReader(
        lambda: _open_reader(config, layout, tile, total_length, autoencoder, vision),
        layout.replica_group,
        layout.source_rank,
    )
    encoder = Encoder(config, layout, autoencoder, vision)
    validation = None
    if config.validation.interval > 0:
        held_out_reader = ReplicaReader(
            lambda: _open_held_out(config, layout, tile, total_length, autoencoder, vision),
            layout.replica_group,
            layout.source_rank,
        )
        held_out_encoder = Encoder(held_out.held_out_config(config, layout.dp_size), layout, autoencoder, vision)
        validation = Validation(config, layout, stages, ema, held_out_reader, held_out_encoder, rows)
    trainer = Trainer(config, layout, stages, optimizer, ema, reader, encoder, rows, validation, local)
    if resumes and not trainer.resume():
        raise CheckpointError(
            f"no checkpoint of {run_dir} in {local_dir} can be read; delete that folder to start over"
        )
    if config.checkpoint.save_interval and trainer.step < config.training.train_steps:
        space.check(config.checkpoint.run_dir, optimizer, ema is not None)
    return trainer
