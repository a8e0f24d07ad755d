"""Sparse experts out of a dense model's weights (Komatsuzaki et al. 2022, arXiv 2212.05055): every expert is a copy.

The weights of a row's experts sum to 1, so the output at step 0 is the dense model's. Which parameter needs which
tensors is `names.py`'s matter.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.sources import Pretrained, SafetensorsFolder, Scratch, Shape
from megabagel.config.schema import ModelConfig

# the MLP of a layer and stream, what of its sparse form, and the projection within it
_EXPERT = re.compile(r"\.mlp(_moe_gen)?\.experts\.(\d+)\.")
_SPARSE_KEY = re.compile(r"decoder\.layers\.(und|gen)\.mlp\.experts\.")  # in a checkpoint of ours
_SPARSE = re.compile(r"(.+\.mlp(?:_moe_gen)?)\.(gate|shared_expert|experts\.\d+)\.(?:(gate|up|down)_proj\.)?weight")


def experts_in(names: Iterable[str]) -> dict[str, int]:
    """Stream (und, gen) -> number of sparse experts, for streams that have some among released tensor names."""
    found: dict[str, int] = {}
    for name in names:
        if match := _EXPERT.search(name):
            stream = "gen" if match[1] else "und"
            found[stream] = max(found.get(stream, 0), int(match[2]) + 1)
    return found


def check_experts(names: Iterable[str], model: ModelConfig, folder: Path) -> None:
    """Raise CheckpointError when `folder`, which holds `names`, has sparse experts other than those of the model."""
    for stream, experts in experts_in(names).items():
        wanted = getattr(model, f"{stream}_num_experts")
        if wanted != experts:
            has = f"a dense MLP (model.{stream}_num_experts null)" if wanted is None else f"{wanted} experts"
            raise CheckpointError(
                f"{folder} has {experts} sparse experts in the {stream} stream, but the configured model has {has}; "
                f"their number cannot change: set model.{stream}_num_experts to {experts}"
            )


def density_fault(found: Iterable[str], expected: Iterable[str]) -> str | None:
    """What to do when one of two sets of checkpoint keys has sparse experts where the other is dense; None: neither."""
    here, there = ({match[1] for key in keys if (match := _SPARSE_KEY.match(key))} for keys in (found, expected))
    if made := sorted(there - here):
        return (
            f"it has dense MLPs where the model has sparse experts ({', '.join(made)} stream); make a start checkpoint "
            "of it with tools/upcycle_checkpoint.py and train from that with checkpoint.init_from in another "
            "checkpoint.run_dir"
        )
    if lost := sorted(here - there):
        return (
            f"it has sparse experts where the model has dense MLPs ({', '.join(lost)} stream); set "
            f"{' and '.join(f'model.{stream}_num_experts' for stream in lost)} as in the run that wrote it, for "
            "experts cannot become one MLP again"
        )
    return None


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
