"""What validation reads: the held-out groups once, in one order, without dropped conditions; a limited number of packs.

Only settings and files; reading is `megabagel.data`'s business, measuring `validation.py`'s.
"""

import dataclasses
from collections.abc import Mapping

from megabagel.config.datasets import FILE_SUFFIXES, GroupConfig, is_url, load_dataset_groups
from megabagel.config.schema import Config
from megabagel.data.files.storage import list_files

FAULTS_FILE = "validation_faults.jsonl"  # in the run folder


def held_out_config(config: Config, replicas: int) -> Config:
    """The settings of a run that reads the held-out packs as steps, of as many packs as training has at most.

    How the packs are filled does not depend on the layout or the size of a step.
    """
    data = dataclasses.replace(
        config.data,
        dataset_config_file=config.validation.dataset_config_file,
        packing="greedy",
        text_cond_dropout_prob=0.0,
        vit_cond_dropout_prob=0.0,
        vae_cond_dropout_prob=0.0,
        num_workers=min(config.data.num_workers, 1),  # idle most of the time
        seed=config.validation.seed,
    )
    training = dataclasses.replace(config.training, global_batch_size=_packs_per_step(config, replicas))
    return dataclasses.replace(config, data=data, training=training)


def _packs_per_step(config: Config, replicas: int) -> int:
    """Of all replicas; an interleaved pipeline takes multiples of its stages."""
    parallel = config.parallel
    together = 1 if parallel.virtual_pipeline_model_parallel_size is None else parallel.pipeline_model_parallel_size
    needed = -(-config.validation.packs // (replicas * together)) * together
    return replicas * min(needed, config.training.global_batch_size // replicas)


def held_out_groups(path: str) -> dict[str, GroupConfig]:
    """Of the data file at `path`, each to be read once."""
    return {name: dataclasses.replace(group, repeats=1) for name, group in load_dataset_groups(path).items()}


def shared_files(training: Mapping[str, GroupConfig], held_out: Mapping[str, GroupConfig]) -> list[str]:
    """Local files that groups of both name."""
    return sorted(_files(training) & _files(held_out))


def _files(groups: Mapping[str, GroupConfig]) -> set[str]:
    paths = {data.path for group in groups.values() if group.weight > 0 for data in group.datasets.values()}
    return {file for path in paths if not is_url(path) for file in list_files(path, FILE_SUFFIXES)}
