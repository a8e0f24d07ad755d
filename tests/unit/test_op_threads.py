"""Threads share rows and tokens anywhere, also inside a picture: the results are those of one thread, bit for bit."""

import pytest
import torch

from megabagel.ops import library
from megabagel.ops.flow import flow_mix
from megabagel.ops.loss_rows import loss_row_gather
from megabagel.ops.stream import stream_merge, stream_split

pytestmark = pytest.mark.skipif(not library.LOADED, reason="the C++ operators are not built")


def results() -> list[torch.Tensor]:
    """Of every operator that moves rows, large enough for several threads."""
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(3001, generator=draw)[:2000]
    inverse = torch.full((3001,), -1)
    inverse[order] = torch.arange(2000)
    x = torch.randn(3001, 33, generator=draw, requires_grad=True)
    merged = stream_merge(x, order, inverse, torch.bfloat16)
    split = stream_split(merged, inverse, order, torch.float32)
    loss_rows = loss_row_gather(split, order.sort().values)
    (gradient,) = torch.autograd.grad((loss_rows * torch.arange(33.0)).sum(), x)
    grids = torch.tensor([[7, 61], [1, 1], [13, 97], [40, 50]])
    tokens = int(grids.prod(1).sum())
    latents, noise = torch.randn(tokens * 16, generator=draw), torch.randn(tokens, 16, generator=draw)
    flow = flow_mix(latents, grids, noise, torch.rand(tokens, generator=draw), 2, torch.float32)
    return [merged, split, loss_rows, gradient, *flow]


def test_any_number_of_threads_gives_the_bits_of_one():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(results(), alone, strict=True))
    finally:
        torch.set_num_threads(before)
