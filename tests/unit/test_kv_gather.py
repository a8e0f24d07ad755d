"""kv_gather: the heads of both streams in attention order as PyTorch's functions give them, forwards and backwards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megabagel.ops import library
from megabagel.ops.kv_gather import HeadNorms, kv_gather, kv_gather_reference

compiled = pytest.mark.skipif(not library.LOADED, reason="the C++ operators are not built")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}


def placement(rows: int, count: int) -> tuple[Tensor, Tensor]:
    """`count` of `rows` rows in some order, and the way back."""
    order = torch.randperm(rows)[:count]
    inverse = torch.full((rows,), -1)
    inverse[order] = torch.arange(count)
    return order, inverse


def arguments(
    rows: tuple[int, int], count: int, groups: int, heads: int, d: int, dtype: torch.dtype, norms: bool = True
) -> list:
    """Arguments of a call that puts `count` rows of streams of `rows` rows in some order; the norms in a flat list."""
    streams = [torch.randn(r, groups * (heads + 2) * d).to(dtype) for r in rows]
    weights = [torch.randn(d).to(dtype) if norms else None for _ in range(4)]
    angles = torch.rand(count, d // 2) * 6
    return [*streams, *weights, angles.cos(), angles.sin(), *placement(sum(rows), count), heads, d, 1e-6]


def results(function, und: Tensor, gen: Tensor, *rest) -> list[Tensor]:
    """The values, and the gradients of a weighted sum of them."""
    und, gen, *weights = (t if t is None else t.detach().clone().requires_grad_(True) for t in (und, gen, *rest[:4]))
    out = function(und, gen, HeadNorms(*weights), *rest[4:])
    loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in out)
    return [*out, *torch.autograd.grad(loss, [t for t in (und, gen, *weights) if t is not None])]


@st.composite
def calls(draw: st.DrawFn) -> list:
    rows = draw(st.tuples(st.integers(0, 6), st.integers(0, 6)))
    count = draw(st.integers(0, sum(rows)))  # 0: all padding
    d = draw(st.sampled_from([2, 6, 16, 34, 64]))
    dtype, norms = draw(st.sampled_from(list(TOLERANCE))), draw(st.booleans())
    return arguments(rows, count, draw(st.integers(1, 3)), draw(st.integers(1, 4)), d, dtype, norms)


@settings(max_examples=80, deadline=None)
@given(calls())
def test_values_and_gradients_are_those_of_the_reference(call):
    mine = results(kv_gather, *call)
    in_double = [t.double() if t is not None and i < 6 else t for i, t in enumerate(call)]
    for a, exact in zip(mine, results(kv_gather_reference, *in_double), strict=True):
        assert a.dtype == call[0].dtype and a.shape == exact.shape
        assert (a.double() - exact).norm() <= TOLERANCE[a.dtype] * exact.norm() + TOLERANCE[a.dtype]


def test_rows_without_a_place_get_no_gradient_and_disturb_nothing():
    call = arguments((5, 4), 6, 2, 2, 8, torch.float32)
    unused = call[9] < 0
    clean = results(kv_gather, *call)
    call[0][unused[:5]] = call[1][unused[5:]] = 1e4
    for before, after in zip(clean, results(kv_gather, *call), strict=True):
        assert torch.equal(before, after)
    assert unused.sum() == 3 and not torch.cat(clean[3:5])[unused].any()


def test_a_stream_without_norms_beside_one_with_them():
    call = arguments((3, 4), 6, 1, 2, 8, torch.float32)
    call[2] = call[3] = None
    for mine, expected in zip(results(kv_gather, *call), results(kv_gather_reference, *call), strict=True):
        assert torch.allclose(mine, expected, atol=1e-5)


@compiled
def test_gradients_do_not_depend_on_the_threads():
    call, threads = arguments((200, 300), 400, 2, 2, 16, torch.float32), torch.get_num_threads()
    try:
        seen = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.append(results(kv_gather, *call))
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_a_million_rows():
    call = arguments((400_000, 600_000), 999_999, 1, 1, 2, torch.float32)
    q, k, v, *gradients = results(kv_gather, *call)
    rows = torch.cat(call[:2])[call[8][-3:]]
    assert torch.equal(v[-3:, 0], rows[:, 4:])
    assert all(torch.isfinite(t).all() for t in (q, k, *gradients))


@compiled
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, torch.zeros(4, 8), "equally wide, a multiple of 32"),
        (1, torch.zeros(4, 64, dtype=torch.float64), "of one type and device"),
        (2, torch.ones(7), r"the weights of the norms must be contiguous \[8\]"),
        (3, torch.ones(8, dtype=torch.bfloat16), "of the type and on the device of und"),
        (6, torch.zeros(6, 3), r"cos and sin must be contiguous float32 \[6, 4\]"),
        (7, torch.zeros(5, 4), r"cos and sin must be contiguous float32 \[6, 4\]"),
        (8, torch.arange(5), r"order must be contiguous \[6\] and inverse \[7\]"),
        (8, torch.arange(6, dtype=torch.int32), "order must be int64"),
        (8, torch.tensor([0, 1, 2, 3, 4, 7]), r"order\[5\] is 7, but must lie in 0 .. 6"),
        (8, torch.tensor([0, 1, 2, 3, -1, 5]), r"order\[4\] is -1"),
        (8, torch.tensor([0, 1, 2, 3, 4, 4]), r"order\[5\] is 4, but inverse leads back to 4"),
        (9, torch.tensor([0, 1, 2, 3, 4, 5, 6]), r"inverse\[6\] is 6, but must lie in -1 .. 5"),
        (11, 7, "head_dim must be even"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(place, value, message):
    call = arguments((3, 4), 6, 2, 2, 8, torch.float32)
    call[8], call[9] = torch.arange(6), torch.tensor([0, 1, 2, 3, 4, 5, -1])
    torch.ops.megabagel.kv_gather(*call)
    call[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.megabagel.kv_gather(*call)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.megabagel.kv_gather_backward(torch.zeros(6, 4, 8), *[torch.zeros(6, 2, 8)] * 2, *call)


@compiled
def test_gradients_of_another_shape_are_refused():
    call = arguments((3, 4), 6, 2, 2, 8, torch.float32)
    with pytest.raises(RuntimeError, match=r"a gradient must be contiguous \[6, 2, 8\]"):
        torch.ops.megabagel.kv_gather_backward(torch.zeros(6, 4, 8), *[torch.zeros(6, 1, 8)] * 2, *call)


@compiled
@pytest.mark.parametrize("norms", [True, False])
def test_pytorch_accepts_the_operator(norms):
    call = arguments((2, 3), 4, 2, 1, 4, torch.float64, norms)
    for tensor in call[:6]:
        if tensor is not None:
            tensor.requires_grad_(True)
    torch.library.opcheck(torch.ops.megabagel.kv_gather, tuple(call))
    detached = [t.detach() if isinstance(t, Tensor) else t for t in call]
    gradients = [torch.randn(4, 2, 4, dtype=torch.float64) for _ in range(3)]
    torch.library.opcheck(torch.ops.megabagel.kv_gather_backward, (*gradients, *detached))
    torch.autograd.gradcheck(lambda *t: kv_gather(*t[:2], HeadNorms(*t[2:6]), *t[6:]), call)
