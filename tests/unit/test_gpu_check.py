"""gpu_check.py notices what a kernel can do wrong, keeps what it found when a process dies, and degrades without a GPU.

What needs a GPU is only shown to be skipped here; the comparisons themselves run on the CPU.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))

from baseline.flex_mask import flex_masked_attention  # noqa: E402
from baseline.gather_scatter import dense_attention, dense_masks  # noqa: E402
from baseline.mix import mixed_plan  # noqa: E402
from gpu import attention, bandwidth  # noqa: E402
from gpu.draw import Draw  # noqa: E402
from gpu.op_table import OPS, Op  # noqa: E402
from gpu.ops import TOLERANCE, check_call, poisoned_memory  # noqa: E402
from gpu.precision import copy_weights  # noqa: E402
from gpu.report import Report, read_section  # noqa: E402
from parity.compare import Group  # noqa: E402

from megabagel.models.attention import prepare_attention  # noqa: E402
from megabagel.ops import library  # noqa: E402

CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")


def run_call(op: Op, dtype: torch.dtype = torch.float32, rows: int = 9, width: int = 5) -> tuple[Group, list[str]]:
    group = Group(TOLERANCE[dtype])
    with poisoned_memory():
        return group, check_call(op, Draw(3, rows, width, dtype, CPU, misaligned=True), 3, group)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_operators_of_the_table_agree_with_their_references(op, dtype):
    if not library.has_kernel(op.name, torch.empty(0)):
        pytest.skip(f"{op.name} is not compiled for the CPU")
    for rows, width in ((0, 3), (1, 1), (37, 40)):
        group, wrong = run_call(op, dtype, rows, width)
        assert not wrong and group.error <= group.tolerance, (rows, width, group)


class _Double(torch.autograd.Function):
    """2 * x with what the test wants to go wrong."""

    @staticmethod
    def forward(ctx, x: Tensor, slope: float) -> Tensor:
        ctx.slope = slope
        return 2 * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.slope * grad, None


def _forgets_a_row(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[:-1] = 2 * x.detach()[:-1]
    return out + 0 * x


def _reads_behind(x: Tensor) -> Tensor:
    return 2 * x + 0 * x.detach().as_strided(x.shape, x.stride(), x.storage_offset() + 1)


def _writes_behind(x: Tensor) -> Tensor:
    x.detach().as_strided((1,), (1,), x.storage_offset() + x.numel()).fill_(0)
    return 2 * x


def _never_the_same(x: Tensor) -> Tensor:
    return 2 * x + 1e-7 * torch.rand(x.shape)


def _doubled(name: str, call) -> Op:
    return Op(name, call, lambda x: 2 * x, lambda draw: (draw.floats(draw.rows, draw.width),))


def test_a_right_operator_passes():
    group, wrong = run_call(_doubled("right", lambda x: _Double.apply(x, 2.0)))
    assert not wrong and group.error == 0 and group.checked == 2


@pytest.mark.parametrize("call", [_forgets_a_row, _reads_behind, lambda x: _Double.apply(x, 2.001), lambda x: x + x**3])
def test_wrong_values_are_seen_in_both_directions(call):
    group, _ = run_call(_doubled("wrong", call))
    assert group.error > group.tolerance


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (_writes_behind, "writes outside of its arguments"),
        (_never_the_same, "out 0 is not the same twice"),
        (lambda x: 2 * x.detach(), "gives ['out 0'], the reference ['grad 0', 'out 0']"),
    ],
)
def test_what_no_comparison_of_values_sees_is_said(call, said):
    assert said in run_call(_doubled("wrong", call))[1]


def test_a_process_that_dies_loses_nothing_and_is_named_with_what_it_did(tmp_path):
    program = f"""
import os, sys
sys.path.insert(0, {str(TOOLS)!r})
from pathlib import Path
from gpu.report import Report
report = Report(Path(sys.argv[1]))
report.begin("first"); report.row("first", True, error=0.5)
report.begin("second"); os.kill(os.getpid(), 9)
"""
    path = tmp_path / "rows.jsonl"
    code = subprocess.run([sys.executable, "-c", program, path], stdout=subprocess.DEVNULL).returncode
    entry = read_section(path, code, 1.0)
    assert entry["rows"] == [{"pass": True, "error": 0.5, "name": "first"}]
    assert entry["status"] == "failed" and entry["failed"] == ["the process ended with status -9 in second"]
    assert read_section(path, None, 1.0)["failed"] == ["the process took too long in second"]


def test_a_missed_target_is_named_but_is_no_failure(tmp_path):
    report = Report(tmp_path / "rows.jsonl")
    report.measured("slow", 0.4, 0.7)
    report.measured("fast", 0.9, 0.7)
    entry = read_section(report.path, 0, 1.0)
    assert entry["status"] == "passed" and entry["missed"] == ["slow"] and not entry["failed"]


@without_gpu
def test_without_a_gpu_the_rest_is_skipped_with_a_reason(tmp_path):
    out = tmp_path / "gpu_results.json"
    command = [sys.executable, str(TOOLS / "gpu_check.py"), "--only", "golden", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line, results = json.loads(done.stdout.splitlines()[-1]), json.loads(out.read_text())
    assert line["gpu"] is None and line["golden"] == "skipped" and line["pass"]
    assert results["gpu"] is None and results["sections"]["golden"]["skipped"] == ["there is no GPU."]


def test_attention_is_compared_row_by_row(tmp_path, monkeypatch):
    report = Report(tmp_path / "rows.jsonl")
    case = attention.Case("small", mixed_plan(200, area=9), 4, 2, 16)
    attention.check(case, "sdpa", torch.float32, CPU, report)

    def one_key_too_many(problems, length, backend, device, dtype):
        problems = problems.clone()
        if dtype == torch.float32:  # the backend under test, not what it is compared with
            problems[:, 4] = 0
        return prepare_attention(problems, length, backend, device, dtype)

    monkeypatch.setattr(attention, "prepare_attention", one_key_too_many)
    attention.check(case, "sdpa", torch.float32, CPU, report)
    right, wrong = read_section(report.path, 0, 1.0)["rows"]
    assert right["pass"] and right["error"] < 1e-5
    assert not wrong["pass"] and wrong["error"] > 0.1


def test_traffic_counts_every_value_that_must_move():
    by_name = {op.name: op for op in OPS}
    x, out = torch.empty(10, 6), torch.empty(10, 3)
    assert bandwidth.traffic(by_name["swiglu"], (x,), [out], [x]) == (4 * 90, 4 * (30 + 60 + 60))
    rows, taken = torch.tensor([1, 2]), torch.empty(2, 6)
    gathered = bandwidth.traffic(by_name["loss_row_gather"], (x, rows), [taken], [x])
    assert gathered == (4 * 24 + 16, 4 * (12 + 60) + 16)


class _Norm(nn.Module):
    def __init__(self, values: float):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), values))


def test_weights_of_norms_find_their_place_in_the_linears_behind_them():
    source, target = nn.Module(), nn.Module()
    source.input_layernorm, source.linear_qkv = _Norm(1.0), _Norm(2.0)
    target.linear_qkv = _Norm(0.0)
    target.linear_qkv.layer_norm_weight = nn.Parameter(torch.zeros(2))
    copy_weights(source, target)
    assert target.linear_qkv.layer_norm_weight.tolist() == [1, 1] and target.linear_qkv.weight.tolist() == [2, 2]
    target.more = _Norm(0.0)
    with pytest.raises(RuntimeError, match="the other decoder has no more.weight"):
        copy_weights(source, target)


def test_the_baselines_mask_function_sees_what_its_dense_masks_see():
    plan = mixed_plan(300, area=20)
    q, k = torch.randn(plan.sequence_length, 4, 16), torch.randn(plan.sequence_length, 2, 16)
    with torch.no_grad():
        found = flex_masked_attention(plan, CPU)(q, k, k)
        expected = dense_attention(dense_masks(plan))(q, k, k)
    torch.testing.assert_close(found, expected)


def test_both_decoders_of_the_layer_bench_agree():
    command = [sys.executable, "-W", "ignore", str(TOOLS / "bench_layers.py"), "--scale", "tiny", "--repeats", "1"]
    done = subprocess.run([*command, "--tokens", "300", "--picture-tokens", "20"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["bench"] == "layers" and set(line["ratios"]) == set(line["units"])
    assert line["difference"] < 1e-5
    values = line["values"]["two streams"]
    assert values["TFLOP/s official"] > values["TFLOP/s mask-aware"] > 0
