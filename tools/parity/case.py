"""A golden case on disk: its tensors, its description and the configuration that they ask for.

It reads the folder and nothing else; the plans made of it are in `plans.py`.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megabagel.config.checks import check_layout
from megabagel.config.folder import LAYER_VARIANTS, read_model_config
from megabagel.config.schema import (
    CheckpointConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)

# fields that the official code takes from its command line: meta.json has the last word
_MODEL_FIELDS = (
    "connector_act interpolate_pos latent_patch_size max_latent_size timestep_shift visual_und visual_gen "
    "freeze_llm freeze_vit freeze_und tie_word_embeddings"
).split()


class CaseError(ValueError):
    """The case folder cannot be used; the message says what is wrong with which file."""


@dataclass
class Case:
    """`batch` and `expected` hold the tensors of the two files, `meta` the JSON description."""

    folder: Path
    meta: dict
    batch: dict[str, Tensor]
    expected: dict[str, Tensor]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "ckpt"

    @property
    def samples(self) -> int:
        return len(self.meta["sample_lens"])


def load_case(folder: str | Path) -> Case:
    """Raises CaseError, in one sentence, when a file is missing or damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CaseError(f"there is no case folder {folder}")
    for name in ("meta.json", "batch.safetensors", "expected.safetensors", "ckpt"):
        if not (folder / name).exists():
            raise CaseError(
                f"{folder} has no {name}; a case holds ckpt/, batch.safetensors, expected.safetensors and meta.json"
            )
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CaseError(f"{folder / 'meta.json'} is not valid JSON: {error}") from None
    case = Case(folder, meta, _tensors(folder / "batch.safetensors"), _tensors(folder / "expected.safetensors"))
    for file in ("batch", "expected"):
        missing = sorted(set(meta["tensors"][file]) - set(getattr(case, file)))
        if missing:
            raise CaseError(f"{folder / file}.safetensors has no tensor {missing[0]}, which meta.json lists")
    return case


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CaseError(f"{path} is not a whole safetensors file: {error}") from None


def model_config(case: Case) -> ModelConfig:
    """The shape of the checkpoint's JSON files, with the switches of meta.json."""
    described = case.meta["config"]
    if described.get("vit_rope"):
        raise CaseError(f"{case.folder}: a vision tower with rotary positions (vit_rope) is not part of this model")
    model = read_model_config(str(case.checkpoint), ModelConfig())
    changes = {name: described[name] for name in _MODEL_FIELDS if name in described}
    if "layer_module" in described:
        changes["layer_variant"] = LAYER_VARIANTS[described["layer_module"]]
    if "qk_norm" in described:
        changes["qk_layernorm"] = described["qk_norm"]
    vit = {}
    if "vit_max_num_patch_per_side" in described:
        vit["max_num_patch_per_side"] = described["vit_max_num_patch_per_side"]
    if "vit_layers_used" in described:
        vit["num_layers"] = described["vit_layers_used"]
    return dataclasses.replace(model, **changes, vit=dataclasses.replace(model.vit, **vit))


def run_config(
    case: Case, parallel: ParallelConfig, processes: int, training: dict[str, object] | None = None
) -> Config:
    """float32 training with the recipe of the case's trajectory on so many processes. `training`: further settings of
    that group. Raises ConfigError when the layout does not fit."""
    recipe = case.meta["trajectory"]["recipe"]
    config = Config(
        model=model_config(case),
        parallel=parallel,
        optimizer=OptimizerConfig(
            lr=recipe["lr"],
            lr_warmup_steps=0,
            adam_beta1=recipe["betas"][0],
            adam_beta2=recipe["betas"][1],
            adam_eps=recipe["eps"],
            weight_decay=recipe["weight_decay"],
            clip_grad=recipe["max_grad_norm"],
            ema_decay=recipe["ema_decay"],
        ),
        # as good as any number that suits the layout: micro-batches are made of the case's samples
        training=TrainingConfig(params_dtype="fp32", global_batch_size=processes, **(training or {})),
        checkpoint=CheckpointConfig(init_from=str(case.checkpoint)),
    )
    check_layout(config, processes)
    return config


def latent_pictures(case: Case, model: ModelConfig) -> Tensor:
    """`vae.latent` without its padding, picture after picture, cut into as many rows as there are tokens: float32
    [Nl, d]."""
    patch = model.latent_patch_size
    width, grids = patch**2 * model.vae.z_channels, case.meta["patchified_vae_latent_shapes"]
    if not grids:
        return torch.empty(0, width)
    parts = zip(case.expected["vae.latent"], grids, strict=True)
    return torch.cat([x[:, : h * patch, : w * patch].reshape(-1, width) for x, (h, w) in parts])
