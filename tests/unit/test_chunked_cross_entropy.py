"""The chunked vocabulary loss: the numbers of the full path, the memory of a chunk, no work that nobody asked for."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from megabagel.models.loss_rows import share_rows
from megabagel.models.vocabulary_head import vocabulary_loss
from megabagel.ops import library
from megabagel.ops.cross_entropy import (
    cross_entropy_gradient_,
    cross_entropy_gradient_reference_,
    cross_entropy_statistics,
    cross_entropy_statistics_reference,
)

compiled = pytest.mark.skipif(not library.LOADED, reason="the C++ operators are not built")


@st.composite
def shards(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels of which some belong to other shards, row weights."""
    rows = draw(st.integers(0, 6))
    classes = draw(st.sampled_from([1, 2, 15, 16, 17, 33, 1023, 1024, 1025, 2500]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0]))
    torch.manual_seed(draw(st.integers(0, 1000)))
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    labels = torch.randint(-2, classes + 2, (rows,))
    return (
        (torch.randn(rows, classes) * scale + draw(st.sampled_from([0, -500]))).to(dtype),
        labels,
        torch.randn(rows, dtype=exact),
    )


@settings(max_examples=150, deadline=None)
@given(shards())
def test_kernels_are_equal_to_the_reference(case):
    logits, labels, weights = case
    statistics = cross_entropy_statistics(logits, labels)
    expected = cross_entropy_statistics_reference(logits, labels)
    torch.testing.assert_close(statistics, expected, rtol=1e-6, atol=0)
    normalizer = expected[0] + expected[1].log()
    found, expected = logits.clone(), logits.clone()
    cross_entropy_gradient_(found, labels, normalizer, weights)
    cross_entropy_gradient_reference_(expected, labels, normalizer, weights)
    rounding = 2**-8 if logits.dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(found, expected, rtol=rounding, atol=3e-7)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 12), st.integers(1, 40), st.integers(1, 9), st.integers(1, 14), st.integers(0, 1000))
def test_loss_and_gradients_are_those_of_the_full_path(rows, classes, width, chunk_rows, seed):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(classes, width, requires_grad=True)
    labels, row_weights = torch.randint(classes, (rows,)), torch.rand(rows)
    logits = hidden @ weight.T
    of_rows = cross_entropy(logits, labels, reduction="none")
    expected = (of_rows * row_weights).sum()
    total, losses = vocabulary_loss(hidden, weight, labels, row_weights, None, chunk_rows)
    size = float(logits.detach().abs().max()) + 1 if rows else 1  # a loss is a difference of numbers of this size
    torch.testing.assert_close(losses, of_rows.detach(), rtol=1e-6, atol=1e-6 * size)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6 * size * max(rows, 1))
    found = torch.autograd.grad(total * -3, [hidden, weight])
    wanted = torch.autograd.grad(expected * -3, [hidden, weight])
    # a gradient is a sum over rows of products of this size at most, of which much may cancel
    size = 3 * max(rows, 1) * max([float(t.detach().abs().max()) for t in (hidden, weight) if t.numel()] + [1])
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 * size)


def test_bfloat16_adds_the_weight_gradient_up_in_float32():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 32, dtype=torch.bfloat16, requires_grad=True) for n in (256, 300))
    labels, row_weights = torch.randint(300, (256,)), torch.ones(256)
    losses = cross_entropy((hidden @ weight.T).float(), labels, reduction="none")
    expected = torch.autograd.grad(losses.sum() / 7, [hidden, weight])
    total, _ = vocabulary_loss(hidden, weight, labels, row_weights, None, 3)
    found = torch.autograd.grad(total / 7, [hidden, weight])
    assert total.dtype == torch.float32 and [g.dtype for g in found] == [torch.bfloat16] * 2
    torch.testing.assert_close(total, losses.sum(), rtol=1e-6, atol=0)
    for mine, wanted in zip(found, expected, strict=True):
        assert (mine - wanted).norm() < 0.01 * wanted.norm()  # a sum of 86 chunks in bfloat16 is off by 0.05


class Recorder(TorchDispatchMode):
    """Matrix products and values of the largest results with a column per class."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes, self.calls, self.rows = classes, Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls[function.overloadpacket.__name__] += 1
        if isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] == self.classes:
            self.rows = max(self.rows, out.shape[0])
        return out

    @property
    def products(self) -> int:
        return self.calls["mm"] + self.calls["addmm_"]


@pytest.mark.parametrize(
    ("hidden_trains", "weight_trains", "gradients", "products"),
    [
        (True, True, True, 3),
        (True, False, True, 2),
        (False, True, True, 2),
        (False, False, True, 1),
        (True, True, False, 1),
    ],
    ids=["all", "frozen head", "frozen stream", "nothing trains", "no_grad"],
)
def test_only_a_chunk_of_logits_exists_and_nothing_is_computed_twice(hidden_trains, weight_trains, gradients, products):
    rows, classes, chunk_rows = 50, 1000, 8
    hidden, weight = torch.randn(rows, 4), torch.randn(classes, 4)
    hidden.requires_grad_(hidden_trains), weight.requires_grad_(weight_trains)
    with Recorder(classes) as recorder, torch.set_grad_enabled(gradients):
        total, losses = vocabulary_loss(hidden, weight, torch.zeros(rows).long(), torch.ones(rows), None, chunk_rows)
        if total.requires_grad:
            total.backward()
    assert total.requires_grad == (gradients and (hidden_trains or weight_trains)) and not losses.requires_grad
    assert recorder.rows == chunk_rows
    assert recorder.products == products * math.ceil(rows / chunk_rows)
    assert (hidden.grad is not None, weight.grad is not None) == (
        hidden_trains and gradients,
        weight_trains and gradients,
    )


def test_without_a_row_the_weights_are_in_the_graph():
    hidden, weight = torch.randn(0, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    total, losses = vocabulary_loss(hidden, weight, torch.zeros(0).long(), torch.zeros(0), None, 4)
    total.backward()
    assert total == 0 and losses.shape == (0,) and weight.grad.eq(0).all() and hidden.grad.shape == (0, 3)


def test_gradcheck():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    labels, row_weights = torch.randint(7, (5,)), torch.rand(5, dtype=torch.float64)
    for chunk_rows in (2, 8):
        assert torch.autograd.gradcheck(
            lambda h, w, chunk=chunk_rows: vocabulary_loss(h, w, labels, row_weights, None, chunk)[0], (hidden, weight)
        )


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    logits, labels = torch.randn(4, 9).to(dtype), torch.tensor([0, 8, -1, 9])
    per_row = [torch.rand(4, dtype=torch.float64 if dtype == torch.float64 else torch.float32) for _ in range(2)]
    torch.library.opcheck(torch.ops.megabagel.cross_entropy_statistics, (logits, labels))
    torch.library.opcheck(torch.ops.megabagel.cross_entropy_gradient_, (logits, labels, *per_row))


def test_a_million_rows():
    logits, labels = torch.randn(1_000_000, 2), torch.randint(2, (1_000_000,))
    maximum, sums, picked = cross_entropy_statistics(logits, labels)
    losses = maximum + sums.log() - picked
    torch.testing.assert_close(losses, cross_entropy(logits, labels, reduction="none"), rtol=1e-5, atol=1e-6)


def test_what_is_not_a_number_shows_and_what_is_impossible_counts_nothing():
    logits = torch.zeros(3, 2000)
    logits[0, 1999] = torch.nan
    logits[1, :1500] = -torch.inf
    logits[2, 3] = torch.inf
    maximum, sums, _ = cross_entropy_statistics(logits, torch.zeros(3).long())
    losses = maximum + sums.log()
    assert losses[0].isnan() and losses[1] == pytest.approx(math.log(500)) and losses[2].isnan()


def test_numbers_do_not_depend_on_the_number_of_threads():
    logits, labels, results = torch.randn(64, 3000), torch.randint(3000, (64,)), []
    threads = torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        statistics, gradient = cross_entropy_statistics(logits, labels), logits.clone()
        cross_entropy_gradient_(gradient, labels, statistics[0] + statistics[1].log(), torch.ones(64))
        results.append((statistics, gradient))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@compiled
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3).half(), torch.zeros(2).long(), "float32, bfloat16 or float64"),
        (torch.zeros(3, 2).T, torch.zeros(2).long(), "must be contiguous"),
        (torch.zeros(2, 0), torch.zeros(2).long(), "at least one class"),
        (torch.zeros(2, 3), torch.zeros(3).long(), "one for each of the 2 rows"),
        (torch.zeros(2, 3), torch.zeros(2).int(), "labels must be int64"),
    ],
)
def test_wrong_arguments_raise_a_sentence(logits, labels, message):
    with pytest.raises(RuntimeError, match=message):
        cross_entropy_statistics(logits, labels)
    with pytest.raises(RuntimeError, match=message):
        cross_entropy_gradient_(logits, labels, torch.zeros(2), torch.zeros(2))


@compiled
def test_per_row_values_are_checked():
    with pytest.raises(RuntimeError, match="weights must be contiguous .* 2 rows, float32"):
        cross_entropy_gradient_(torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(2), torch.zeros(2).double())


def test_a_label_that_is_no_class_raises_a_sentence():
    with pytest.raises(ValueError, match=r"labels lie in 0 \.\. 5, but must lie in 0 \.\. 4"):
        vocabulary_loss(torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 5]), torch.ones(2), None, 4)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.integers(1, 10), st.data())
def test_shared_rows_put_together_are_the_streams(ranks, share, data):
    length = share * ranks
    rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, length - 1)))), dtype=torch.int64)
    stream = torch.arange(length)
    shared = [share_rows(rows, length, rank, ranks) for rank in range(ranks)]
    counts = [len(own) for own, _ in ((s.own[s.own >= 0], s) for s in shared)]
    assert all(len(s.own) == max(1, *counts) for s in shared)
    parts = [stream[rank * share : (rank + 1) * share][s.own] for rank, s in enumerate(shared)]
    assert all(torch.equal(torch.cat(parts)[s.places], rows) for s in shared)
