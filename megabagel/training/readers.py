"""Opens what packs are read from: the training data and the held-out data, on the source rank of a replica.

What is done with the packs is the loop's and the validation's matter.
"""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megabagel.config.datasets import GroupConfig, load_dataset_groups
from megabagel.config.paths import tokenizer_path
from megabagel.config.schema import Config
from megabagel.data.faults import FAULTS_FILE, DataError
from megabagel.data.reader import Reader
from megabagel.data.stored import StoredLatents, stored_kinds
from megabagel.data.text import Tokenizer
from megabagel.models.autoencoder import Autoencoder
from megabagel.models.vision import VisionTower, is_frozen
from megabagel.packing.cost import CostModel
from megabagel.packing.geometry import geometry_of
from megabagel.runtime.distributed import Layout, gather_objects
from megabagel.training import held_out
from megabagel.training.cost_model import cost_model
from megabagel.training.stored import check_stored

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sources:
    """What all readers of a run share. Packs are padded to `tile` rows a stream, or to `total_length` in all.

    The encoders are those that what is stored of pictures must come from; `vision` only where it is frozen.
    """

    config: Config
    layout: Layout
    tile: int
    total_length: int | None
    autoencoder: Autoencoder | None
    vision: VisionTower | None

    def open_training(self) -> Reader:
        """Raises DataError."""
        return self._open(self.config, load_dataset_groups(self.config.data.dataset_config_file), FAULTS_FILE)

    def open_held_out(self) -> Reader:
        """Raises DataError."""
        wanted = self.config.validation
        file = wanted.dataset_config_file
        groups = held_out.held_out_groups(file)
        shared = held_out.shared_files(load_dataset_groups(self.config.data.dataset_config_file), groups)
        if shared and self.layout.dp_rank == 0:
            logger.warning(
                "held-out data %s: %d of its files are training data too, for example %s; what is measured there is "
                "how well the run remembers",
                file,
                len(shared),
                shared[0],
            )
        config = held_out.held_out_config(self.config, self.layout.dp_size)
        try:
            return self._open(config, groups, held_out.FAULTS_FILE, wanted.packs)
        except DataError as error:
            raise DataError(f"held-out data {file}: {error}") from None

    def _open(
        self, config: Config, groups: dict[str, GroupConfig], faults_file: str, max_packs: int | None = None
    ) -> Reader:
        layout = self.layout
        tokenizer = Tokenizer(tokenizer_path(config))
        if len(tokenizer) > config.model.vocab_size:
            raise DataError(
                f"the tokenizer {tokenizer.folder} has {len(tokenizer)} tokens, more than model.vocab_size = "
                f"{config.model.vocab_size}; raise vocab_size or choose the model's own tokenizer."
            )
        check_stored(groups, self.autoencoder, self.vision)
        return Reader(
            config.data,
            groups,
            tokenizer,
            geometry_of(config.model, tokenizer.special),
            tile=self.tile,
            total_length=self.total_length,
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
