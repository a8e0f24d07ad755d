"""What one rank does in a layout: the real trainer on the packs of `packs.py`, and what the tests compare.

Functions here run in the workers; nothing here judges.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from megabagel.config.autoencoder import AutoencoderConfig
from megabagel.config.checks import check_model
from megabagel.config.schema import Config, ModelConfig, VisionConfig
from megabagel.packing.geometry import geometry_of
from megabagel.runtime.distributed import initialize
from megabagel.training import setup
from megabagel.training.loop import Trainer
from megabagel.training.readers import Sources
from tests.distributed.layouts.faults import FAULTS
from tests.distributed.layouts.gradients import Held, held_norms, reduced_gradients
from tests.distributed.layouts.packs import SPECIAL, STEPS, PackReader

Steps = Sequence[Sequence[str]]  # kinds of the packs of every step
AUTOENCODER = Path(__file__).resolve().parents[2] / "golden" / "public-basic" / "ckpt"


@dataclasses.dataclass
class StepValues:
    """What a step reports on one rank, before its update; losses are None where no token carries them."""

    ce: float | None
    mse: float | None
    grad_norm: float


@dataclasses.dataclass
class Trained:
    """What a rank hands back."""

    steps: list[StepValues]
    gradients: Held  # of the last step


def tiny_config(options: dict[str, Any]) -> Config:
    """A model of seconds with every part; `options` sets fields by dotted names."""
    config = Config()
    config.model = ModelConfig(
        hidden_size=64,
        num_layers=4,
        num_attention_heads=8,
        num_query_groups=2,
        ffn_hidden_size=96,
        vocab_size=256,
        max_latent_size=8,
        init_std=0.1,  # far from uniform attention, which would hide mistakes
        vit=VisionConfig(32, 2, 2, 64, patch_size=4, max_num_patch_per_side=8),
        vae=AutoencoderConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4),
    )
    config.training.params_dtype = "fp32"
    config.data.max_num_tokens = 192
    config.optimizer.lr = 2e-3
    config.optimizer.lr_warmup_steps = 0
    config.optimizer.adam_eps = 1e-6  # below the gradients, above their rounding, which smaller ones would amplify
    config.optimizer.ema_decay = None
    config.checkpoint.init_vae = str(AUTOENCODER)
    config.checkpoint.auto_resume = False
    config.checkpoint.save_interval = 0  # who saves calls it, into a folder of its own
    for name, value in options.items():
        *path, field = name.split(".")
        group = config
        for part in path:
            group = getattr(group, part)
        if field not in {f.name for f in dataclasses.fields(group)}:
            raise ValueError(f"there is no setting {name}")
        setattr(group, field, value)
    return config


def make_trainer(options: dict[str, Any], steps: Steps = STEPS) -> Trainer:
    """The trainer of `training/setup.py`; only its reader is replaced, by one of packs of these kinds."""
    config = tiny_config(options)
    config.training.global_batch_size = len(steps[0])
    check_model(config)
    layout = initialize(config.parallel, seed=3)

    def open_training(sources: Sources) -> PackReader:
        geometry = geometry_of(config.model, SPECIAL)
        return PackReader(steps, layout.dp_rank, layout.dp_size, geometry, sources.tile, sources.total_length)

    with mock.patch.object(Sources, "open_training", open_training):
        return setup.build_trainer(config, layout)


def train(options: dict[str, Any], steps: Steps = STEPS, fault: str | None = None) -> Trained:
    """Train through `steps` on this rank. `fault`: a mistake to make, see `faults.py`."""
    trainer = make_trainer(options, steps)
    with FAULTS[fault](trainer) if fault else contextlib.nullcontext():
        values = [trainer.train_step() for _ in steps]
    return Trained([StepValues(v["ce"], v["mse"], v["grad_norm"]) for v in values], held_norms(trainer))


def vision_gradients(options: dict[str, Any], fault: str | None = None) -> dict[str, Tensor]:
    """Gradients of the tower and the connector after a step, by released name; empty on stages without them."""
    trainer = make_trainer(options, STEPS[:1])
    with FAULTS[fault](trainer) if fault else contextlib.nullcontext():
        trainer.train_step()
    gradients = reduced_gradients(trainer).items()
    return {name: shard for name, (shard, _) in gradients if name.startswith(("vit_model.", "connector."))}
