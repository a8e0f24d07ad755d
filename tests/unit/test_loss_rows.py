"""loss_row_gather: equal to PyTorch's functions forwards and backwards, and a sentence instead of a wrong read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megabagel.ops import library
from megabagel.ops.loss_rows import loss_row_gather, loss_row_gather_reference

compiled = pytest.mark.skipif(not library.LOADED, reason="the C++ operators are not built")


@st.composite
def tables(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A table and increasing rows of it, with entries of -1 between them."""
    count, width = draw(st.integers(0, 40)), draw(st.integers(0, 9))
    rows = sorted(draw(st.sets(st.integers(0, count - 1)))) if count else []
    for place in draw(st.lists(st.integers(0, 40), max_size=5)):
        rows.insert(place, -1)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    shape = draw(st.sampled_from([(count, width), (count, width, 3), (count,)]))
    return torch.randn(shape).to(dtype), torch.tensor(rows, dtype=torch.int64)


@settings(max_examples=150, deadline=None)
@given(tables())
def test_values_and_gradient_are_those_of_the_reference(case):
    x, rows = case
    results = []
    for function in (loss_row_gather, loss_row_gather_reference):
        leaf = x.clone().requires_grad_(True)
        out = function(leaf, rows)
        weights = torch.arange(1, out.numel() + 1, dtype=x.dtype).reshape(out.shape)
        (gradient,) = torch.autograd.grad((out * weights).sum(), leaf)
        results.append((out, gradient))
    for mine, expected in zip(*results, strict=True):
        assert mine.dtype == expected.dtype and torch.equal(mine, expected)


def test_a_million_rows_keep_their_values_and_gradient_places():
    x = torch.arange(1_000_000, dtype=torch.float32)[:, None].repeat(1, 2).requires_grad_(True)
    rows = torch.cat([torch.arange(0, 1_000_000, 3), torch.tensor([-1])])
    out = loss_row_gather(x, rows)
    assert torch.equal(out[:-1, 0], torch.arange(0, 1_000_000, 3.0)) and not out[-1].any()
    out.sum().backward()
    assert x.grad.sum() == 2 * (len(rows) - 1) and x.grad[::3].eq(1).all()


@pytest.mark.parametrize("x", [torch.randn(6, 5, 4)[:, 2], torch.randn(4, 6).T, torch.randn(3, 1).expand(6, 4, 3, 5)])
def test_views_are_read_like_copies(x):
    rows = torch.tensor([1, -1, 4])
    assert torch.equal(loss_row_gather(x, rows), loss_row_gather_reference(x, rows))


@compiled
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([0, 7]), r"rows\[1\] is 7, but must lie in -1 .. 6"),
        (torch.tensor([-2, 1]), r"rows\[0\] is -2"),
        (torch.tensor([2, 2]), "must be 0 or more and increase"),
        (torch.tensor([3, -1, 1]), r"rows\[2\] is 1 behind 3"),
        (torch.tensor([0], dtype=torch.int32), "must be int64"),
        (torch.zeros(1, 1, dtype=torch.int64), "one dimension"),
    ],
)
def test_rows_that_are_no_loss_rows_are_named(rows, message):
    with pytest.raises(RuntimeError, match=message):
        loss_row_gather(torch.zeros(7, 2), rows)
    with pytest.raises(RuntimeError):
        torch.ops.megabagel.loss_row_scatter(torch.zeros(rows.numel(), 2), rows, 7)


@compiled
def test_only_tables_of_numbers_are_taken():
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float64"):
        loss_row_gather(torch.zeros(3, 2, dtype=torch.int64), torch.tensor([0]))
    with pytest.raises(RuntimeError, match="at least one dimension"):
        loss_row_gather(torch.tensor(1.0), torch.tensor([-1]))


@compiled
def test_pytorch_accepts_the_operator():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([0, -1, 2, 4])
    torch.library.opcheck(torch.ops.megabagel.loss_row_gather, (x, rows))
    torch.library.opcheck(torch.ops.megabagel.loss_row_scatter, (torch.randn(4, 3), rows, 5))
    torch.autograd.gradcheck(loss_row_gather, (x, rows))
