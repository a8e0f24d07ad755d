"""stream_split and stream_merge: equal to PyTorch's functions, each the other's gradient, sentences for wrong input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megabagel.ops import library
from megabagel.ops.stream import stream_merge, stream_merge_reference, stream_split, stream_split_reference

compiled = pytest.mark.skipif(not library.LOADED, reason="the C++ operators are not built")
FLOATS = [torch.float32, torch.bfloat16, torch.float64]


def make_order(length: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """`length` distinct ones of so many rows, and the way back."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:length]
    inverse = torch.full((rows,), -1)
    inverse[order] = torch.arange(length)
    return order, inverse


@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(0, 30),
    padding=st.integers(0, 20),
    shape=st.sampled_from([(), (0,), (1,), (7,), (64,), (3, 5), (1, 2, 4)]),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from([None, *FLOATS])),
    seed=st.integers(0, 2**20),
)
def test_values_and_gradients_are_those_of_the_references(length, padding, shape, dtypes, seed):
    order, inverse = make_order(length, length + padding, seed)
    dtype, wanted = dtypes
    for rows, index, back, functions in (
        (length, inverse, order, (stream_split, stream_split_reference)),
        (length + padding, order, inverse, (stream_merge, stream_merge_reference)),
    ):
        x = torch.randn(rows, *shape).to(dtype)
        results = []
        for function in functions:
            leaf = x.clone().requires_grad_(True)
            out = function(leaf, index, back, wanted)
            weights = torch.arange(1, out.numel() + 1, dtype=out.dtype).reshape(out.shape)
            results.append((out, *torch.autograd.grad((out * weights).sum(), leaf)))
        for mine, expected in zip(*results, strict=True):
            assert mine.dtype == expected.dtype and torch.equal(mine, expected)


def test_a_million_tokens_go_there_and_back():
    order, inverse = make_order(1_000_000, 1_000_016, 0)
    x = torch.randn(1_000_000, 3)
    rows = stream_split(x, inverse, order, torch.float64)
    assert torch.equal(rows[order].float(), x) and not rows[inverse < 0].any()
    assert torch.equal(stream_merge(rows, order, inverse, torch.float32), x)


def test_views_are_read_like_copies():
    order, inverse = make_order(6, 9, 1)
    for x in (torch.randn(6, 4, 5)[:, 1:3], torch.randn(2, 6, 4).transpose(0, 1), torch.randn(1, 3).expand(6, 3)):
        assert torch.equal(stream_split(x, inverse, order), stream_split_reference(x, inverse, order))


def test_casts_round_to_nearest_and_keep_what_is_no_number():
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, 1e-40, 1.00390625, 1.01171875]
    x = torch.cat([torch.tensor(special), torch.randn(10_000)])[None]
    order = inverse = torch.tensor([0])
    narrow = stream_split(x, inverse, order, torch.bfloat16)
    torch.testing.assert_close(narrow, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    wide = stream_merge(narrow, order, inverse, torch.float32)
    torch.testing.assert_close(wide, narrow.float(), rtol=0, atol=0, equal_nan=True)


@compiled
def test_wrong_indices_and_values_raise_a_sentence():
    order, inverse = make_order(3, 5, 2)
    sequence, streams = torch.zeros(3, 2), torch.zeros(5, 2)
    cases = [
        (stream_split, (sequence, inverse + 9, order), r"inverse\[0\] is \d+, but must lie in -1 .. 2"),
        (stream_split, (sequence, inverse, order[:2]), "order has 2 entries and must have one for each row of x"),
        (stream_merge, (streams, order - 9, inverse), r"order\[0\] is -\d+, but must lie in 0 .. 4"),
        (stream_merge, (streams, torch.tensor([0, -1, 2]), inverse), r"order\[1\] is -1"),
        (stream_merge, (streams, order.int(), inverse), "order must be int64"),
        (stream_merge, (streams, order, inverse[:, None]), "inverse must have one dimension"),
        (stream_split, (sequence.int(), inverse, order), "float32, bfloat16 or float64"),
        (stream_split, (sequence, inverse, order, torch.int64), "float32, bfloat16 or float64"),
        (stream_split, (torch.tensor(1.0), inverse, order), "one for each row of x"),
    ]
    for function, arguments, message in cases:
        with pytest.raises(RuntimeError, match=message):
            function(*arguments)


@compiled
def test_pytorch_accepts_the_operators():
    order, inverse = make_order(4, 6, 3)
    ops = torch.ops.megabagel
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(ops.stream_split, (x, inverse, order, torch.float32))
    torch.library.opcheck(ops.stream_merge, (y, order, inverse, torch.bfloat16))
    torch.autograd.gradcheck(stream_split, (x, inverse, order))
    torch.autograd.gradcheck(stream_merge, (y, order, inverse))
    torch.autograd.gradgradcheck(stream_merge, (y, order, inverse))
