"""Sources of released BAGEL tensors, read lazily: safetensors folders, a Qwen2.5 + SigLIP pair, and from scratch.

A source answers with the slice that is asked for, so that no process ever holds the full model. Not for writing.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.names import EMBEDDING, LM_HEAD
from megabagel.checkpoint.safetensors_file import SafetensorsFile, Spec, read_head
from megabagel.runtime import rng

Shape = tuple[int, ...]
PATCH_EMBEDDING = "vit_model.vision_model.embeddings.patch_embedding.weight"
_CHUNK = 1 << 22  # values drawn, or read of rows that only some columns are wanted of, at a time


class SafetensorsFolder:
    """The tensors of `{stem}.safetensors`, or of the files that `{stem}.safetensors.index.json` names.

    The first of `stems` that the folder holds wins.
    """

    def __init__(self, folder: str | Path, stems: tuple[str, ...] = ("model",)):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"there is no folder {self.folder} to read weights from")
        self._files: dict[str, SafetensorsFile] = {}
        self._file_of = self._locate(stems)

    def _locate(self, stems: tuple[str, ...]) -> dict[str, str]:
        """Tensor name -> file name."""
        for stem in stems:
            file = f"{stem}.safetensors"
            if (self.folder / file).is_file():
                return dict.fromkeys(self._open(file).specs, file)
            index = self.folder / f"{file}.index.json"
            if index.is_file():
                try:
                    return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
                except (ValueError, KeyError, TypeError):
                    raise CheckpointError(f"{index} is not an index of safetensors files; copy it again") from None
        wanted = " or ".join(f"{stem}.safetensors" for stem in stems)
        raise CheckpointError(f"{self.folder} holds neither {wanted} nor an index JSON beside it")

    def _open(self, file: str) -> SafetensorsFile:
        if file not in self._files:
            path = self.folder / file
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, although the index of {self.folder} names it")
            opened = SafetensorsFile(path, read_head(path))
            opened.check_size()
            self._files[file] = opened
        return self._files[file]

    def close(self) -> None:
        self._files.clear()

    def names(self) -> set[str]:
        return set(self._file_of)

    def holds(self, name: str) -> bool:
        return name in self._file_of

    @property
    def is_divided(self) -> bool:
        """Whether the tensors are in several files."""
        return len(set(self._file_of.values())) > 1

    def file_of(self, name: str) -> str:
        """Name of the file that holds a tensor."""
        return self._file_of[name]

    def dtype(self, name: str) -> torch.dtype:
        """Raises CheckpointError when there is no such tensor."""
        return self._spec(name).dtype

    def _spec(self, name: str) -> Spec:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder} has no tensor {name}, which the configured model needs")
        specs = self._open(self._file_of[name]).specs
        if name not in specs:
            raise CheckpointError(
                f"{self.folder / self._file_of[name]} has no tensor {name}, although the index of the folder says so"
            )
        return specs[name]

    def shape(self, name: str) -> Shape:
        """Raises CheckpointError when there is no such tensor."""
        return self._spec(name).shape

    def read(self, name: str, shape: Shape, dim: int | None, start: int, stop: int) -> Tensor:
        """See `names.Source`; in the dtype of the file."""
        found = self.shape(name)
        if found != shape:
            hint = ""
            if name.endswith("embeddings.position_embedding.weight"):
                side = round(found[0] ** 0.5)
                hint = f"; it holds {side} x {side} patches: set model.vit.max_num_patch_per_side to {side}"
            raise CheckpointError(
                f"tensor {name} in {self.folder / self._file_of[name]} has shape {list(found)}, "
                f"but the configured model expects {list(shape)}{hint}"
            )
        file = self._open(self._file_of[name])
        if dim != 1:
            return file.read(name, *((start, stop) if dim == 0 else ()))
        out = torch.empty((shape[0], stop - start, *shape[2:]), dtype=self.dtype(name))
        step = max(1, _CHUNK // math.prod(shape[1:]))
        for row in range(0, shape[0], step):
            out[row : row + step] = file.read(name, row, min(row + step, shape[0]))[:, start:stop]
        return out


class Scratch:
    """Initial values drawn by tensor name: the same model whatever the layout.

    Matrices N(0, std^2); those of the ViT's patch embedding and of the connector N(0, 1 / inputs) (LeCun et al. 1998),
    for behind both stand position tables, in which a small picture would drown. Biases 0, norm gains 1; gen twins equal
    their und tensors, `llm2vae` is 0.
    """

    def __init__(self, seed: int, std: float):
        self.seed, self.std = seed, std

    def close(self) -> None: ...

    def names(self) -> set[str]:
        return set()

    def read(self, name: str, shape: Shape, dim: int | None, start: int, stop: int) -> Tensor:
        """See `names.Source`; float32, drawn in chunks of rows so that little more than the slice is in memory."""
        rows = (start, stop) if dim == 0 else (0, shape[0])
        local = (rows[1] - rows[0], *shape[1:])
        if name.startswith("llm2vae.") or name.endswith(".bias"):
            out = torch.zeros(local)
        elif len(shape) == 1:
            out = torch.ones(local)
        else:
            out = self._normal(und_twin(name), shape, *rows)
        return out[:, start:stop] if dim == 1 else out

    def _normal(self, name: str, shape: Shape, start: int, stop: int) -> Tensor:
        width = torch.Size(shape[1:]).numel()
        std = width**-0.5 if name == PATCH_EMBEDDING or name.startswith("connector.") else self.std
        step = max(1, _CHUNK // width)
        out, filled = torch.empty((stop - start, *shape[1:])), 0
        for chunk in range(start // step, -(-stop // step)):
            first = chunk * step
            rows = min(step, shape[0] - first)
            drawn = torch.from_numpy(rng.normal(self.seed, f"weights {name}", (chunk,), (rows, *shape[1:])))
            part = drawn[max(start - first, 0) : stop - first]
            torch.mul(part, std, out=out[filled : filled + len(part)])
            filled += len(part)
        return out


class Pretrained:
    """A Qwen2.5 folder and/or a SigLIP folder under BAGEL names; what neither has comes from `scratch`.

    Gen twins are copies of the language model's tensors. An untied head that the folder lacks (its model was tied)
    starts as the embedding.
    """

    def __init__(self, llm: SafetensorsFolder | None, vit: SafetensorsFolder | None, scratch: Scratch):
        self.llm, self.vit, self.scratch = llm, vit, scratch

    @property
    def folder(self) -> Path:
        """Where the language model is from, or else the ViT."""
        return (self.llm or self.vit).folder

    def close(self) -> None:
        for part in (self.llm, self.vit):
            if part:
                part.close()

    def names(self) -> set[str]:
        """Empty: these folders hold tensors (text tower, pooling head) that BAGEL has no use for."""
        return set()

    def holds(self, name: str) -> bool:
        """Whether the language model has the tensor; names of its own parts only."""
        return self.llm is not None and self.llm.holds(_in_llm(name))

    def shape(self, name: str) -> Shape:
        """Of a tensor that the language model holds; raises CheckpointError when it does not."""
        return self.llm.shape(_in_llm(name))

    def read(self, name: str, shape: Shape, dim: int | None, start: int, stop: int) -> Tensor:
        """See `names.Source`."""
        if self.vit and name.startswith("vit_model."):
            if name == PATCH_EMBEDDING:
                return self._patch_embedding(shape)
            return self.vit.read(name.removeprefix("vit_model."), shape, dim, start, stop)
        if self.llm and name.startswith("language_model."):
            theirs = _in_llm(name)
            if name == LM_HEAD and not self.llm.holds(theirs):
                theirs = _in_llm(EMBEDDING)
            # Qwen2.5 has no norms on q and k: they start as identity gains
            if self.llm.holds(theirs) or not theirs.endswith(("q_norm.weight", "k_norm.weight")):
                return self.llm.read(theirs, shape, dim, start, stop)
        return self.scratch.read(name, shape, dim, start, stop)

    def _patch_embedding(self, shape: Shape) -> Tensor:
        """SigLIP's convolution [h, 3, p, p] as a linear map [h, p*p*3]: row, column, channel."""
        name = PATCH_EMBEDDING.removeprefix("vit_model.")
        side = round((shape[1] // 3) ** 0.5)
        if len(self.vit.shape(name)) == 2:
            return self.vit.read(name, shape, None, 0, 0)
        return self.vit.read(name, (shape[0], 3, side, side), None, 0, 0).permute(0, 2, 3, 1).reshape(shape)


def _in_llm(name: str) -> str:
    return und_twin(name).removeprefix("language_model.")


def und_twin(name: str) -> str:
    """The understanding tensor behind a released name (itself, unless it is a gen twin)."""
    return name.replace("_moe_gen", "")
