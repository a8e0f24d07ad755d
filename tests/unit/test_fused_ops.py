"""swiglu and rms_norm: equal to PyTorch's functions forwards and backwards, the same on any number of threads."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megabagel.ops import library
from megabagel.ops.rms_norm import rms_norm, rms_norm_reference
from megabagel.ops.swiglu import swiglu, swiglu_reference

compiled = pytest.mark.skipif(not library.LOADED, reason="the C++ operators are not built")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}
DTYPES = st.sampled_from(list(TOLERANCE))
SIZES = st.tuples(st.integers(0, 5), st.integers(1, 3), st.sampled_from([5, 16, 17, 64, 130]))


def results(function, *inputs: Tensor) -> list[Tensor]:
    """The value, and the gradients of a weighted sum of it."""
    leaves = [x.clone().requires_grad_(True) for x in inputs]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


def assert_close(mine: list[Tensor], expected: list[Tensor], exact: list[Tensor]) -> None:
    """Each like the reference in shape and type, and as near to float64 as its type allows."""
    for a, b, c in zip(mine, expected, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        error, scale = (a.double() - c).norm(), c.norm()
        assert error <= TOLERANCE[a.dtype] * scale + 1e-30, (error, scale)


@settings(max_examples=80, deadline=None)
@given(SIZES, DTYPES, st.floats(0.01, 30))
def test_swiglu_is_that_of_the_reference(size, dtype, scale):
    x = (torch.randn(*size[:2], 2 * size[2]) * scale).to(dtype)
    exact = results(swiglu_reference, x.double())
    assert_close(results(swiglu, x), results(swiglu_reference, x), exact)


@settings(max_examples=80, deadline=None)
@given(SIZES, DTYPES, st.floats(0.01, 30))
def test_rms_norm_is_that_of_the_reference(size, dtype, scale):
    x, weight = (torch.randn(size) * scale).to(dtype), torch.randn(size[2]).to(dtype)
    exact = results(lambda *t: rms_norm_reference(*t, 1e-6), x.double(), weight.double())
    reference = results(lambda *t: rms_norm_reference(*t, 1e-6), x, weight)
    assert_close(results(lambda *t: rms_norm(*t, 1e-6), x, weight), reference, exact)


def test_zero_rows_stay_finite():
    mine = results(lambda *t: rms_norm(*t, 1e-6), torch.zeros(3, 8), torch.ones(8))
    for value, expected in zip(
        mine, results(lambda *t: rms_norm_reference(*t, 1e-6), torch.zeros(3, 8), torch.ones(8)), strict=True
    ):
        assert torch.allclose(value, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_of_any_gate(dtype):
    gates = [*range(-130, 131), *(sign * 10.0**e for e in range(-30, 31, 3) for sign in (-1, 1)), 0.0, math.inf]
    gate = torch.tensor(gates).to(dtype)
    x = torch.stack([gate, torch.ones_like(gate)], dim=-1)
    mine, expected = swiglu(x), swiglu_reference(x)
    assert torch.allclose(mine, expected, rtol=5e-7 if dtype == torch.float32 else 1e-2, atol=1e-36)
    assert swiglu(torch.full((2, 40), math.nan)).isnan().all()


@compiled
def test_the_gradient_of_a_weight_does_not_depend_on_the_threads():
    x, weight, threads = torch.randn(1000, 48), torch.randn(48), torch.get_num_threads()
    try:
        seen = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.append(results(lambda *t: rms_norm(*t, 1e-6), x, weight))
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_a_million_rows():
    x = torch.randn(1_000_000, 8)
    out, dx, d_weight = results(lambda *t: rms_norm(*t, 1e-6), x, torch.ones(8))
    assert torch.allclose(out[-1], rms_norm_reference(x[-1:], torch.ones(8), 1e-6)[0], atol=1e-6)
    assert dx.shape == x.shape and d_weight.isfinite().all()
    assert torch.allclose(swiglu(x)[-1], swiglu_reference(x[-1:])[0], atol=1e-6)


@compiled
def test_views_are_read_right():
    x = torch.randn(4, 3, 12).transpose(0, 1)[..., 2:10]
    assert torch.allclose(swiglu(x), swiglu_reference(x), atol=1e-6)
    assert torch.allclose(rms_norm(x, torch.ones(8), 1e-6), rms_norm_reference(x, torch.ones(8), 1e-6), atol=1e-6)


@compiled
def test_what_does_not_fit_is_refused_in_a_sentence():
    with pytest.raises(RuntimeError, match="the last one even"):
        swiglu(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float64"):
        swiglu(torch.zeros(2, 4, dtype=torch.float16))
    with pytest.raises(RuntimeError, match=r"the weight must be contiguous \[4\] of the type of x"):
        rms_norm(torch.zeros(2, 4), torch.ones(3), 1e-6)
    with pytest.raises(RuntimeError, match="of the type of x"):
        rms_norm(torch.zeros(2, 4), torch.ones(4, dtype=torch.bfloat16), 1e-6)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float64"):
        rms_norm(torch.zeros(2, 4, dtype=torch.int64), torch.ones(4, dtype=torch.int64), 1e-6)
    for grad in (torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="the gradient must be contiguous"):
            torch.ops.megabagel.swiglu_backward(grad, torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match="rstd must be what the forward pass gave"):
        torch.ops.megabagel.rms_norm_backward(torch.zeros(2, 4), torch.zeros(2, 4), torch.ones(4), torch.ones(3))


@compiled
def test_pytorch_accepts_the_operators():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    ops = torch.ops.megabagel
    torch.library.opcheck(ops.swiglu, (x,))
    torch.library.opcheck(ops.swiglu_backward, (torch.randn(3, 3, dtype=torch.float64), x.detach()))
    torch.library.opcheck(ops.rms_norm, (x, weight, 1e-6))
    _, rstd = ops.rms_norm(x.detach(), weight.detach(), 1e-6)
    torch.library.opcheck(ops.rms_norm_backward, (torch.randn_like(x), x.detach(), weight.detach(), rstd))
    torch.autograd.gradcheck(swiglu, (x,))
    torch.autograd.gradcheck(lambda *t: rms_norm(*t, 1e-6), (x, weight))
