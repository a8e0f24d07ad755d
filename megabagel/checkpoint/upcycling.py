"""Sparse experts out of a dense model's weights (Komatsuzaki et al. 2022, arXiv 2212.05055): every expert is a copy.

The weights of a row's experts sum to 1, so the output at step 0 is the dense model's. Which parameter needs which
tensors is `names.py`'s matter.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.sources import Pretrained, SafetensorsFolder, Scratch, Shape

# the MLP of a layer and stream, what of its sparse form, and the projection within it
_SPARSE = re.compile(r"(.+\.mlp(?:_moe_gen)?)\.(gate|shared_expert|experts\.\d+)\.(?:(gate|up|down)_proj\.)?weight")


def dense_twin(name: str) -> str | None:
    """The dense MLP's tensor that an expert's copies, and for the router and a shared expert one of the same MLP.

    None for names of anything else.
    """
    match = _SPARSE.fullmatch(name)
    return f"{match[1]}.{match[3] or 'gate'}_proj.weight" if match else None


class Upcycled:
    """`source`, and where its MLP is dense, sparse experts made from it.

    The router, which a dense model lacks, starts from `scratch`; so does a shared expert, except that its last
    projection starts at zero.
    """

    def __init__(self, source: SafetensorsFolder | Pretrained, scratch: Scratch):
        self.source, self.scratch = source, scratch
        self.has_copied = False

    @property
    def folder(self) -> Path:
        return self.source.folder

    def close(self) -> None:
        self.source.close()

    def names(self) -> set[str]:
        return self.source.names()

    def shape(self, name: str) -> Shape:
        """Raises CheckpointError when there is no such tensor."""
        return self.source.shape(name)

    def read(self, name: str, shape: Shape, dim: int | None, start: int, stop: int) -> Tensor:
        """See `names.Source`; raises CheckpointError when an expert is to be of another width than the dense MLP."""
        dense = dense_twin(name)
        if dense is None or self.source.holds(name) or not self.source.holds(dense):
            return self.source.read(name, shape, dim, start, stop)
        self.has_copied = True
        if ".experts." in name:
            self._check_width(dense, shape)
            return self.source.read(dense, shape, dim, start, stop)
        drawn = self.scratch.read(name, shape, dim, start, stop)
        return torch.zeros_like(drawn) if name.endswith("shared_expert.down_proj.weight") else drawn

    def _check_width(self, dense: str, shape: Shape) -> None:
        found = self.source.shape(dense)
        side = 1 if dense.endswith("down_proj.weight") else 0
        if found[side] != shape[side]:
            raise CheckpointError(
                f"sparse experts cannot be copies of {dense}, whose width is {found[side]}, because theirs is "
                f"{shape[side]}; leave model.moe_ffn_hidden_size out, or start from weights that have sparse experts"
            )
