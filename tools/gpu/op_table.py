"""Every compiled operator of megabagel with its reference and a way to draw arguments: one entry each.

A new operator is one more entry; `ops.py` and `bandwidth.py` do the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpu.draw import Draw
from megabagel.ops.cross_entropy import (
    cross_entropy_gradient_,
    cross_entropy_gradient_reference_,
    cross_entropy_statistics,
    cross_entropy_statistics_reference,
)
from megabagel.ops.flow import flow_mix, flow_mix_reference
from megabagel.ops.kv_gather import HeadNorms, kv_gather, kv_gather_reference
from megabagel.ops.loss_rows import loss_row_gather, loss_row_gather_reference
from megabagel.ops.rms_norm import rms_norm, rms_norm_reference
from megabagel.ops.stream import stream_merge, stream_merge_reference, stream_split, stream_split_reference
from megabagel.ops.swiglu import swiglu, swiglu_reference


@dataclass(frozen=True)
class Op:
    """`arguments(draw)`: a call's arguments, about draw.rows x draw.width values; tensors inside tuples count too.

    For the bandwidth: `large`: rows and width of a call that fills the GPU. `reads_inputs_again`: the backward pass
    reads the inputs beside the gradient. `gathers`: only as many bytes of the first argument are read as are written.
    `in_place`: what `call` does to a copy of its first argument, to be timed without that copy.
    """

    name: str
    call: Callable
    reference: Callable
    arguments: Callable[[Draw], tuple]
    large: tuple[int, int] = (34_816, 3584)
    reads_inputs_again: bool = True
    gathers: bool = False
    in_place: Callable | None = None


def _swiglu(draw: Draw) -> tuple:
    return (draw.floats(draw.rows, 2 * draw.width),)


def _padded(draw: Draw) -> int:
    """Rows of a stream whose padding is up to a tenth, at least one row."""
    return draw.rows + 1 + draw.random.randint(0, draw.rows // 10)


def _stream_split(draw: Draw) -> tuple:
    order, inverse = draw.placement(_padded(draw), draw.rows)
    return draw.floats(draw.rows, draw.width), inverse, order, draw.random.choice([None, torch.bfloat16])


def _stream_merge(draw: Draw) -> tuple:
    rows = _padded(draw)
    order, inverse = draw.placement(rows, draw.rows)
    return draw.floats(rows, draw.width), order, inverse, draw.random.choice([None, torch.float32])


def _loss_rows(draw: Draw) -> tuple:
    rows = draw.subset(draw.rows // 2, draw.rows)
    return draw.floats(draw.rows, draw.width), torch.cat([rows, rows.new_full((1,), -1)])


def _rms_norm(draw: Draw) -> tuple:
    # not less than 8: the gradient of a row of few values is a difference of nearly equal numbers
    width = draw.width if draw.width > 1000 else draw.random.choice([1, 16]) * draw.width + 7
    return draw.floats(draw.rows, width), draw.floats(width), 1e-6


def _flow_mix(draw: Draw) -> tuple:
    """At least as many tokens as rows, in pictures of different shapes."""
    grids = []
    while sum(rows * columns for rows, columns in grids) < draw.rows:
        grids.append((draw.random.randint(1, 64), draw.random.randint(1, 64)))
    tokens = sum(rows * columns for rows, columns in grids)
    channels, patch = (16, 2) if draw.rows > 5000 else draw.random.choice([(16, 2), (3, 1)])
    width = channels * patch**2

    def floats(*shape: int) -> torch.Tensor:
        return draw.floats(*shape, dtype=torch.float32, grad=False)

    grid = torch.tensor(grids, dtype=torch.int64, device=draw.device).view(-1, 2)
    return floats(tokens * width), grid, floats(tokens, width), floats(tokens), patch, draw.dtype


def _kv_gather(draw: Draw) -> tuple:
    """As many rows of the result as rows, two fifths of them und's; large: the heads of BAGEL-7B."""
    choose, is_large = draw.random.choice, draw.width > 1000
    groups, heads, d = (4, 7, 128) if is_large else (choose([1, 2]), choose([1, 3, 7]), choose([32, 64, 80, 128, 256]))
    streams = draw.rows * 2 // 5 + 1, draw.rows - draw.rows * 2 // 5 + 3
    und, gen = (draw.floats(rows, groups * (heads + 2) * d) for rows in streams)
    has_norms = is_large or choose([True, False])
    norms = HeadNorms(*(draw.floats(d) if has_norms else None for _ in range(4)))
    cos, sin = (draw.floats(draw.rows, d // 2, dtype=torch.float32, grad=False) for _ in range(2))
    return und, gen, norms, cos, sin, *draw.placement(sum(streams), draw.rows), heads, d, 1e-6


def _logits(draw: Draw) -> tuple:
    """Labels may be those of another shard of the classes."""
    classes = draw.width if draw.width > 1000 else draw.random.choice([1, 17]) * draw.width
    labels = torch.randint(-1, classes + 2, (draw.rows,), generator=draw.generator, device=draw.device)
    return draw.floats(draw.rows, classes, grad=False), labels


def _logit_gradient(draw: Draw) -> tuple:
    normalizer, weights = (draw.floats(draw.rows, dtype=torch.float32, grad=False) for _ in range(2))
    return *_logits(draw), normalizer, weights


def _on_a_copy(function: Callable) -> Callable:
    """The function that writes into its first argument, as one that returns a new tensor."""

    def call(first: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        out = first.clone()
        function(out, *rest)
        return out

    return call


OPS = (
    Op("swiglu", swiglu, swiglu_reference, _swiglu, large=(17_408, 18_944)),
    Op("rms_norm", rms_norm, rms_norm_reference, _rms_norm, large=(34_816, 3584)),
    Op("kv_gather", kv_gather, kv_gather_reference, _kv_gather),
    Op("flow_mix", flow_mix, flow_mix_reference, _flow_mix, large=(1_000_000, 64)),
    Op("stream_split", stream_split, stream_split_reference, _stream_split, reads_inputs_again=False),
    Op("stream_merge", stream_merge, stream_merge_reference, _stream_merge, reads_inputs_again=False),
    Op(
        "loss_row_gather",
        loss_row_gather,
        loss_row_gather_reference,
        _loss_rows,
        reads_inputs_again=False,
        gathers=True,
    ),
    Op(
        "cross_entropy_statistics",
        cross_entropy_statistics,
        cross_entropy_statistics_reference,
        _logits,
        large=(2048, 152_064),
    ),
    Op(
        "cross_entropy_gradient_",
        _on_a_copy(cross_entropy_gradient_),
        _on_a_copy(cross_entropy_gradient_reference_),
        _logit_gradient,
        large=(2048, 152_064),
        in_place=cross_entropy_gradient_,
    ),
)
