"""A BAGEL folder of random bits, with the names and shapes of the released tensors, for converters to be tried on.

Written rows by rows: memory does not grow with the model. Every value is a finite number below 2.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megabagel.checkpoint.own_keys import own_shapes
from megabagel.checkpoint.released import stored_parameters
from megabagel.checkpoint.safetensors_file import SafetensorsFile, Spec, make_head
from megabagel.config.folder import LATENT_TABLE, VIT_TABLE
from megabagel.config.schema import ModelConfig
from megabagel.config.write_folder import write_model_config

_BLOCK = 1 << 24  # values
_FINITE = 0xBFFF  # without the highest bit of bfloat16's exponent


def write_random_bagel(folder: Path, model: ModelConfig, stems: tuple[str, ...] = ("ema",), seed: int = 1) -> int:
    """Write `folder`, weights in bfloat16, one file per stem; returns the bytes of the largest tensor."""
    folder.mkdir(parents=True)
    rules = [stored.rule for stored in stored_parameters(own_shapes(model), model)]
    shapes = {name: shape for rule in rules for name, shape in zip(rule.names, rule.shapes, strict=True)}
    shapes[LATENT_TABLE] = (model.max_latent_size**2, model.hidden_size)
    shapes[VIT_TABLE] = (model.vit.max_num_patch_per_side**2, model.hidden_size)
    specs = {name: Spec(shape, torch.bfloat16) for name, shape in sorted(shapes.items())}
    for number, stem in enumerate(stems):
        file = SafetensorsFile(folder / f"{stem}.safetensors", make_head(specs))
        file.begin()
        values = _Bits(seed + number)
        for name, spec in specs.items():
            row = 0
            for rows in values.draw(spec.shape):
                file.write(name, rows, row)
                row += len(rows)
    write_model_config(folder, model, "bfloat16")
    total = sum(spec.num_bytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(specs, f"{stems[0]}.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("random numbers\n")
    return max(spec.num_bytes for spec in specs.values())


class _Bits:
    """One block of random bits, scrambled anew for every block that is asked for."""

    def __init__(self, seed: int):
        self._random = np.random.default_rng(seed)
        self._block = self._random.integers(0, 1 << 16, _BLOCK, dtype=np.uint16)

    def draw(self, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """Rows of a tensor of `shape`, some at a time."""
        width = torch.Size(shape[1:]).numel()
        step = max(1, _BLOCK // width)
        for start in range(0, shape[0], step):
            rows = min(step, shape[0] - start)
            bits = (self._block[: rows * width] ^ self._random.integers(1 << 16, dtype=np.uint16)) & _FINITE
            yield torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).view(rows, *shape[1:])
