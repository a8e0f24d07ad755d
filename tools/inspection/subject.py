"""What is inspected: the settings of a run, its groups and tokenizer, opened as by a run but without a model."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from inspection.packs_view import Part
from megabagel.config.datasets import GroupConfig, load_dataset_groups
from megabagel.config.errors import ConfigError
from megabagel.config.load import load_config
from megabagel.config.paths import tokenizer_path
from megabagel.config.schema import Config
from megabagel.data.document import lay_out
from megabagel.data.faults import DataFault
from megabagel.data.loader import SampleMaker
from megabagel.data.mixture import Mixture
from megabagel.data.prepare import Preparer
from megabagel.data.reader import Reader
from megabagel.data.stored import StoredLatents
from megabagel.data.text import Tokenizer
from megabagel.models.vision import is_frozen
from megabagel.packing.binpack import PackLimits
from megabagel.packing.cost import CostModel
from megabagel.packing.geometry import Geometry, geometry_of
from megabagel.packing.sample import Item, Sample
from megabagel.packing.splits import draw_dropout
from megabagel.training.cost_model import cost_model

_KINDS = {"text": "text", "vit_image": "vit"}
TILE = 16  # of the plans; padding is not shown


@dataclass
class Subject:
    """A configuration with its data opened."""

    config: Config
    groups: dict[str, GroupConfig]
    tokenizer: Tokenizer
    geometry: Geometry
    maker: SampleMaker
    costs: CostModel

    @property
    def limits(self) -> PackLimits:
        data = self.config.data
        return PackLimits(
            data.expected_num_tokens,
            data.max_num_tokens,
            data.max_num_tokens_per_sample,
            data.prefer_buffer_before,
            data.max_buffer_size,
        )

    @property
    def weights(self) -> dict[str, float]:
        return {name: group.weight for name, group in self.groups.items()}

    @property
    def mandatory(self) -> list[int]:
        return [index for index, group in enumerate(self.groups.values()) if group.is_mandatory]

    def draws(self, number: int) -> list[int]:
        """Group indices of the first draws of the mixture."""
        mixture = Mixture(self.weights, self.config.data.seed)
        return [mixture.group(draw) for draw in range(number)]

    def packs(self, number: int) -> list:
        """The first packs of the run with their pictures. Raises DataError when there is none."""
        data = replace(self.config.data, num_workers=0, max_bad_fraction=1.0)
        of_step = self.config.training.global_batch_size if data.packing == "balanced" else 1
        found = []
        with (
            _silent_faults(),
            Reader(
                data,
                self.groups,
                self.tokenizer,
                self.geometry,
                tile=TILE,
                global_batch_size=of_step,
                cost_model=self.costs,
                visual_und=self.config.model.visual_und,
                visual_gen=self.config.model.visual_gen,
            ) as reader,
        ):
            while len(found) < number:
                found += reader.next_step()
        return found[:number]

    def parts(self, key: tuple[int, ...]) -> list[Part] | None:
        """The items of a visit before dropout; None where its row cannot be read."""
        group, row, _ = key
        data, model = self.config.data, self.config.model
        try:
            entries = self.maker.sources[group].document(row, tuple(key))
            found = lay_out(entries, visual_und=model.visual_und, visual_gen=model.visual_gen)
        except DataFault:
            return None
        items = [Item(part.kind, loss=part.loss, enable_cfg=part.enable_cfg) for part in found]
        probabilities = {
            "text": data.text_cond_dropout_prob,
            "vit_image": data.vit_cond_dropout_prob,
            "vae_image": data.vae_cond_dropout_prob,
        }
        dropped = draw_dropout(Sample(items, tuple(key), "", ""), probabilities, data.seed)
        kinds = [_KINDS.get(part.kind, "noised" if part.loss else "vae") for part in found]
        return [Part(k, d, part.text) for k, d, part in zip(kinds, dropped, found, strict=True)]


@contextmanager
def _silent_faults() -> Iterator[None]:
    """Bad rows are reported by the survey already."""
    logger = logging.getLogger("megabagel.data.faults")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def open_subject(options: list[str]) -> Subject:
    """`options`: as of a training run. Raises ConfigError, DataError or ValueError with one sentence."""
    config = load_config(options)
    if config.data.dataset_config_file is None:
        raise ConfigError("no data file is given; use --data FILE, or set data.dataset_config_file in --config.")
    if tokenizer_path(config) is None:
        raise ConfigError("no tokenizer is given; use --tokenizer FOLDER, or set data.tokenizer in --config.")
    groups = load_dataset_groups(config.data.dataset_config_file)
    tokenizer = Tokenizer(tokenizer_path(config))
    geometry = geometry_of(config.model, tokenizer.special)
    model = config.model
    frozen = is_frozen(model)
    stored = [StoredLatents.open(group, features=frozen) for group in groups.values()]
    preparer = Preparer(groups, config.data, tokenizer, geometry, model.visual_und, model.visual_gen, stored)
    maker = SampleMaker(groups, preparer, config.data.seed)
    return Subject(config, groups, tokenizer, geometry, maker, cost_model(model))
