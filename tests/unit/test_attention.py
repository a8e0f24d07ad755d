"""The attention backends agree with a dense mask and with one another, on any plan, forward and backward.

What only a GPU runs (flash kernels, compiled FlexAttention) is tested up to its boundary: indices, lists, options.
"""

import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from megabagel.config.checks import check_model
from megabagel.config.errors import ConfigError
from megabagel.config.load import load_config
from megabagel.models.attention import choice, choose_backend, prepare_attention, varlen_kernels
from megabagel.models.attention.block_table import touched_blocks
from megabagel.models.attention.flex import FlexPlan, block_mask, padded_length
from megabagel.models.attention.gather import RowGather
from megabagel.models.attention.sdpa import BlockPlan
from megabagel.models.attention.sdpa_loop import LoopPlan
from megabagel.models.attention.sdpa_short import split_samples
from megabagel.models.attention.varlen import VarlenPlan
from megabagel.models.attention.varlen_kernels import VarlenCall
from megabagel.packing.plan import CAUSAL, NOISE

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SAMPLES = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=5), min_size=1, max_size=4
)
HEADS = st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 2), (3, 3)])


def problems_of(samples: list[list[tuple[int, int]]]) -> np.ndarray:
    """The table of samples, given as (length, mode) of their splits: what is noised comes last in attention order."""
    shared = sum(length for sample in samples for length, mode in sample if mode != NOISE)
    seen, noised, problems = 0, shared, []
    for sample in samples:
        first = seen
        for length, mode in sample:
            start = noised if mode == NOISE else seen
            problems.append([start, length, first, seen - first, int(mode == CAUSAL)])
            noised, seen = (noised + length, seen) if mode == NOISE else (noised, seen + length)
    return np.array(problems, dtype=np.int64)


def dense_mask(problems: np.ndarray) -> torch.Tensor:
    mask = torch.zeros(2 * (int(problems[:, 1].sum()),), dtype=torch.bool)
    for start, length, prefix, prefix_length, causal in problems.tolist():
        own = torch.ones(length, length, dtype=torch.bool)
        mask[start : start + length, prefix : prefix + prefix_length] = True
        mask[start : start + length, start : start + length] = own.tril() if causal else own
    return mask


def dense_attention(q, k, v, mask):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask).transpose(0, 1)


def varlen_reference(q, k, v, call: VarlenCall):
    """What every variable-length kernel computes, problem by problem."""
    results = []
    bounds = (
        torch.stack([lengths[:-1], lengths[1:]], 1).tolist() for lengths in (call.cu_seqlens_q, call.cu_seqlens_kv)
    )
    for (q_start, q_end), (k_start, k_end) in zip(*bounds, strict=True):
        queries, keys = q_end - q_start, k_end - k_start
        assert queries <= call.max_seqlen_q and keys <= call.max_seqlen_kv
        mask = torch.ones(queries, keys, dtype=torch.bool)
        mask = mask.tril(keys - queries) if call.causal else mask
        results.append(dense_attention(q[q_start:q_end], k[k_start:k_end], v[k_start:k_end], mask))
    return torch.cat(results)


def draw_qkv(rows: int, heads: tuple[int, int], d: int = 8, dtype=torch.float32, seed: int = 0):
    """Queries, keys and values as views of one tensor, as the layers hand them over."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(rows, heads[0] + 2 * heads[1], d, generator=generator, dtype=torch.float64).to(dtype)
    return qkv.requires_grad_(), [heads[0], heads[1], heads[1]]


def results(attend, rows: int, heads: tuple[int, int], **options):
    """Output and gradient of the tensor that holds queries, keys and values."""
    qkv, sizes = draw_qkv(rows, heads, **options)
    out = attend(*qkv.split(sizes, 1))
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
    return out.detach(), qkv.grad


BACKENDS = {
    "sdpa": BlockPlan,
    "loop": LoopPlan,
    "varlen": lambda problems: VarlenPlan(problems, varlen_reference, CPU),
}


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(samples=SAMPLES, heads=HEADS)
def test_a_backend_agrees_with_the_dense_mask(backend, samples, heads):
    problems = problems_of(samples)
    mask = dense_mask(problems)
    expected = results(lambda q, k, v: dense_attention(q, k, v, mask), len(mask), heads)
    found = results(BACKENDS[backend](problems), len(mask), heads)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_without_positions(backend):
    out, grad = results(BACKENDS[backend](np.zeros((0, 5), np.int64)), 0, (2, 1))
    assert out.shape == (0, 2, 8) and grad.shape == (0, 4, 8)


# a caption and its noised image, an edit (clean image, text, noised image), texts of one token
MIXED = [[(5, 0), (7, 2)], [(6, 1), (4, 0), (1, 0), (6, 2), (3, 0)], [(1, 0)], [(1, 2), (1, 0)]]


def test_gradients_of_sdpa_are_those_of_its_values():
    plan = BlockPlan(problems_of(MIXED))
    qkv, sizes = draw_qkv(35, (2, 1), d=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: plan(*x.split(sizes, 1)), qkv, fast_mode=True)


def test_sdpa_in_bfloat16_is_as_exact_as_its_inputs():
    problems = problems_of([[(40, 0), (90, 2)] + [(10, 1), (30, 0)] * 5])
    plan, rows = BlockPlan(problems), int(problems[:, 1].sum())
    exact = results(plan, rows, (4, 2), dtype=torch.float64)
    for value, reference in zip(results(plan, rows, (4, 2), dtype=torch.bfloat16), exact, strict=True):
        assert value.dtype == torch.bfloat16
        error = (value.double() - reference).norm() / reference.norm()
        assert error < 6e-3  # a rounding of bfloat16 is 2^-9 = 2e-3


def test_sdpa_gives_the_same_bits_with_any_number_of_threads():
    problems = problems_of([[(70, 0), (90, 2), (30, 1), (50, 0)]])
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            runs.append(results(BlockPlan(problems), 240, (4, 2)))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_attention_gives_the_same_gradients(reentrant):
    plan = BlockPlan(problems_of(MIXED))
    kept = results(plan, 35, (4, 2))
    again = results(lambda *qkv: checkpoint(plan, *qkv, use_reentrant=reentrant), 35, (4, 2))
    for a, b in zip(kept, again, strict=True):
        assert torch.equal(a, b)


def test_a_million_tokens():
    rows, text = 1_000_000, 500
    start = np.arange(0, rows, text)
    problems = np.stack([start, np.full_like(start, text), start, 0 * start, 0 * start + 1], 1)
    q = torch.randn(rows, 1, 8)
    with torch.no_grad():
        out = prepare_attention(torch.from_numpy(problems), rows, "sdpa", CPU)(q, q, q)
        last = BlockPlan(problems[:1])(*(q[-text:],) * 3)
    assert torch.equal(out[-text:], last)
    assert VarlenPlan(problems, varlen_reference, CPU).gather_keys is None  # nothing is copied
    assert len(touched_blocks(problems, -(-rows // 128), 128)[0]) < 60_000


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_a_gather_sums_the_gradient_of_every_copy(lengths, seed):
    rows = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(lengths)), lengths))
    x = torch.randn(len(lengths), 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(rows.size, 2, dtype=torch.float64)
    expected = torch.autograd.grad(x[torch.from_numpy(rows)], x, weights)
    torch.testing.assert_close(torch.autograd.grad(RowGather(rows, CPU)(x), x, weights), expected)


def test_a_gather_sums_bfloat16_in_float32():
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    out = RowGather(np.zeros(513, np.int64), CPU)(x)
    weights = torch.ones_like(out)
    weights[0] = 256  # in bfloat16 256 + 1 = 256
    assert torch.autograd.grad(out, x, weights)[0].item() == 768


# FlexAttention


@settings(max_examples=60, deadline=None)
@given(samples=SAMPLES, block=st.sampled_from([1, 4, 8, 64]))
def test_block_lists_are_those_of_the_dense_mask(samples, block):
    problems = problems_of(samples)
    dense = dense_mask(problems)
    blocks = -(-len(dense) // block)
    mask = torch.zeros(2 * (blocks * block,), dtype=torch.bool)
    mask[: len(dense), : len(dense)] = dense
    tiles = mask.view(blocks, block, blocks, block).transpose(1, 2).flatten(2)
    full, touched = tiles.all(2), tiles.any(2)
    found = block_mask(problems, blocks * block, CPU, block)
    position = torch.arange(blocks * block)
    assert torch.equal(found.mask_mod(None, None, position[:, None], position[None]), mask)
    for expected, prefix in ((touched & ~full, ""), (full, "full_")):
        for name, across in (("kv", expected), ("q", expected.T)):
            counts, listed = (getattr(found, f"{prefix}{name}_{part}")[0, 0] for part in ("num_blocks", "indices"))
            assert counts.dtype == listed.dtype == torch.int32
            assert [row[:n].tolist() for row, n in zip(listed, counts.tolist(), strict=True)] == [
                row.nonzero()[:, 0].tolist() for row in across
            ]


def test_flex_attention_agrees_with_the_dense_mask_and_compiles_twice():
    counter = CompileCounter()
    attend = torch.compile(flex_attention, backend=counter, fullgraph=True)
    for repeats in (1, 5, 9, 14):
        problems = problems_of([[(20, 0), (12, 1), (10, 0), (30, 2)]] * repeats)
        rows = int(problems[:, 1].sum())
        qkv, sizes = draw_qkv(rows, (4, 2), d=16)
        parts = qkv.detach().split(sizes, 1)
        out = FlexPlan(problems, rows, CPU, attend)(*parts)
        torch.testing.assert_close(out, dense_attention(*parts, dense_mask(problems)), atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= 2
    assert FlexPlan(np.zeros((0, 5), np.int64), 0, CPU, attend)(*(x[:0] for x in parts)).shape == (0, 4, 16)


def test_padded_lengths_are_few_and_close():
    lengths = np.arange(1, 100_000, 37)
    padded = np.array([padded_length(int(n)) for n in lengths])
    assert (padded >= lengths).all() and (padded % 128 == 0).all()
    assert (padded < np.maximum(lengths * 1.126, lengths + 128)).all()
    assert len({p for p in padded.tolist() if 32768 < p <= 65536}) == 8


# the kernels of a GPU, as far as a machine without one can tell


def varlen_inputs(dtype=torch.float32):
    q, k, v = (torch.randn(rows, heads, 8, dtype=dtype, requires_grad=True) for rows, heads in ((7, 4), (9, 2), (9, 2)))
    lengths = (torch.tensor(c, dtype=torch.int32) for c in ([0, 3, 7], [0, 5, 9]))
    return (q, k, v), tuple(lengths)


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attn_is_called_as_it_expects(causal, monkeypatch):
    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=None, causal=False,
                               window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False):  # fmt: skip
        assert dropout_p == 0 and not deterministic
        return varlen_reference(q, k, v, VarlenCall(cu_q, cu_k, max_q, max_k, causal))

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    qkv, lengths = varlen_inputs()
    call = VarlenCall(*lengths, 4, 5, causal)
    assert torch.equal(varlen_kernels.flash_attn(*qkv, call), varlen_reference(*qkv, call))


@pytest.mark.parametrize("causal", [True, False])
def test_transformer_engine_is_called_as_it_expects(causal, monkeypatch):
    class DotProductAttention:
        def __init__(self, heads, head_dim, num_gqa_groups, attention_dropout, qkv_format):
            self.shape = heads, num_gqa_groups, head_dim
            assert attention_dropout == 0 and qkv_format == "thd"

        def __call__(self, q, k, v, *, qkv_format, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, attn_mask_type):  # fmt: skip # noqa: E501
            assert self.shape == (q.shape[1], k.shape[1], q.shape[2])
            causal = {"padding_causal_bottom_right": True, "padding": False}[attn_mask_type]
            call = VarlenCall(cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, causal)
            return varlen_reference(q, k, v, call).flatten(1)

    module = types.ModuleType("transformer_engine.pytorch")
    module.DotProductAttention = DotProductAttention
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    varlen_kernels._transformer_engine_attention.cache_clear()
    qkv, lengths = varlen_inputs()
    call = VarlenCall(*lengths, 4, 5, causal)
    out = varlen_kernels.transformer_engine(*qkv, call)
    varlen_kernels._transformer_engine_attention.cache_clear()
    assert torch.equal(out, varlen_reference(*qkv, call))


@pytest.mark.parametrize("causal", [True, False])
def test_torchs_own_kernel_takes_the_call_forward_and_backward(causal):
    with FakeTensorMode(allow_non_fake_inputs=True):
        qkv, lengths = varlen_inputs(torch.bfloat16)
        out = varlen_kernels.torch_varlen(*qkv, VarlenCall(*lengths, 4, 5, causal))
        grads = torch.autograd.grad(out.sum(), qkv)
    assert out.shape == qkv[0].shape and [g.shape for g in grads] == [x.shape for x in qkv]


@pytest.mark.parametrize("causal", [True, False])
def test_torchs_own_kernel_in_its_first_version(causal, monkeypatch):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        return varlen_reference(query, key, value, VarlenCall(cu_seq_q, cu_seq_k, max_q, max_k, is_causal))

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    qkv, lengths = varlen_inputs()
    call = VarlenCall(*lengths, 4, 5, causal)
    assert torch.equal(varlen_kernels.torch_varlen(*qkv, call), varlen_reference(*qkv, call))


@pytest.mark.parametrize(
    "installed, kernel",
    [
        (("flash_attn", "transformer_engine", "torch.nn.attention.varlen"), varlen_kernels.flash_attn),
        (("transformer_engine", "torch.nn.attention.varlen"), varlen_kernels.transformer_engine),
        (("torch.nn.attention.varlen",), varlen_kernels.torch_varlen),
        ((), None),
    ],
)
def test_the_best_installed_kernel_is_taken(installed, kernel, monkeypatch):
    monkeypatch.setattr(varlen_kernels, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert varlen_kernels.find_kernel(CUDA) is kernel
    assert choose_backend("auto", CUDA) == ("flex" if kernel is None else "varlen")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert varlen_kernels.find_kernel(CUDA) is None


# the choice and its sentences


def test_auto_takes_what_the_device_and_the_precision_allow(monkeypatch):
    monkeypatch.setattr(choice, "find_kernel", lambda device: varlen_reference)
    assert choose_backend("auto", CPU) == "sdpa"
    assert choose_backend("auto", CUDA) == "varlen"
    assert choose_backend("auto", CUDA, torch.float32) == "sdpa"
    assert choose_backend("flex", CUDA, torch.float32) == "flex"


@pytest.mark.parametrize(
    "backend, device, dtype, sentence",
    [
        ("dense", CPU, torch.float32, "`dense` is unknown; allowed are auto, sdpa, varlen, flex"),
        ("varlen", CPU, torch.bfloat16, "varlen trains on CUDA only, but the device is cpu"),
        ("flex", CPU, torch.float32, "flex trains on CUDA only, but the device is cpu"),
        ("varlen", CUDA, torch.bfloat16, "finds no kernel on this machine; install flash-attn"),
    ],
)
def test_a_backend_that_cannot_run_says_why(backend, device, dtype, sentence, monkeypatch):
    monkeypatch.setattr(choice, "find_kernel", lambda device: None)
    with pytest.raises(ConfigError, match=sentence):
        choose_backend(backend, device, dtype)


def test_varlen_refuses_full_precision(monkeypatch):
    monkeypatch.setattr(choice, "find_kernel", lambda device: varlen_reference)
    with pytest.raises(ConfigError, match="varlen computes in bfloat16 or float16, but the model is in torch.float32"):
        choose_backend("varlen", CUDA, torch.float32)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (["varlen"], "varlen computes in bf16, but training.params_dtype is fp32; set bf16"),
        (["varlen", "--training.params_dtype=bf16", "--model.num_attention_heads=16"], "4 wide .*multiples of 8"),
        (["flex", "--model.num_attention_heads=16"], "4 wide .*flex takes 16 or more"),
    ],
)
def test_a_configuration_that_a_backend_cannot_compute(settings, sentence):
    backend, *others = settings
    base = ["--config=tiny", "--model.folder=null", "--model.hidden_size=64", "--training.params_dtype=fp32"]
    with pytest.raises(ConfigError, match=sentence):
        check_model(load_config([*base, f"--kernels.attention_backend={backend}", *others]))


@pytest.mark.parametrize(
    "row, sentence",
    [
        ([0, 3, 0, 0, 1], "each of the 4 positions exactly once"),
        ([1, 4, 0, 0, 1], "each of the 4 positions exactly once"),
        ([0, 4, 2, 3, 1], "prefix of an attention problem must lie inside the 4 positions"),
        ([0, 4, -1, 1, 1], "prefix of an attention problem must lie inside the 4 positions"),
        ([0, 4, 0, 0, 2], "0 \\(full\\) or 1 \\(causal\\)"),
        ([0, 4, 0, 0], "must be int64 \\[P, 5\\], not int64 \\[1, 4\\]"),
    ],
)
def test_a_table_that_is_wrong_is_refused(row, sentence):
    with pytest.raises(ValueError, match=sentence):
        prepare_attention(torch.tensor([row]), 4, "auto", CPU)


def test_short_samples_are_told_from_long_ones():
    """Rows in attention order: a text with its noised picture behind all that is shared, a long text, a picture."""
    text, picture = [0, 7, 0, 0, 1], [310, 18, 0, 7, 0]
    long_text, alone = [7, 303, 7, 0, 1], [328, 18, 310, 0, 0]
    short, others = split_samples(np.array([text, long_text, picture, alone]))
    assert [problems.tolist() for problems in short] == [[text, picture], [alone]]
    assert others.tolist() == [long_text]
    # a prefix of rows that no problem of the sample asks about
    assert split_samples(np.array([[20, 4, 3, 5, 0]]))[1].tolist() == [[20, 4, 3, 5, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_short_and_long_samples_side_by_side_give_what_each_problem_alone_gives(dtype):
    problems = np.array(
        [[0, 7, 0, 0, 1], [7, 300, 7, 0, 1], [307, 18, 0, 7, 0], [325, 30, 7, 300, 0], [355, 18, 355, 0, 0]]
    )
    torch.manual_seed(3)
    q, k, v, grad = (torch.randn(373, heads, 16, dtype=dtype, requires_grad=True) for heads in (6, 2, 2, 6))
    plan = BlockPlan(problems)
    assert plan.short is not None and plan.blocks
    results = [
        (out := plan(q, k, v), *torch.autograd.grad(out, (q, k, v), grad)) for plan in (plan, LoopPlan(problems))
    ]
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    for ours, alone in zip(*results, strict=True):
        assert torch.allclose(ours, alone, atol=tolerance, rtol=tolerance)
