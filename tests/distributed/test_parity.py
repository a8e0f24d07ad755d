"""Equality with the reference: the golden cases on every layout, and that the check notices what is wrong.

Launches are shared: see `parity_program.py`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.distributed.launch import ROOT, launch_ok

GOLDEN = ROOT / "tests" / "golden"
PROGRAM = ROOT / "tests" / "distributed" / "parity_program.py"

BASIC, WIDE = "public-basic", "public-wide"  # 4 heads and 4 layers, 8 heads and 6 layers; 2 key heads both
SHORT = {
    "tp": "tensor-model-parallel-size",
    "cp": "context-parallel-size",
    "pp": "pipeline-model-parallel-size",
    "vp": "virtual-pipeline-model-parallel-size",
    "ep": "expert-model-parallel-size",
    "dp": "data-parallel-size",
    "first": "num-layers-in-first-pipeline-stage",
    "last": "num-layers-in-last-pipeline-stage",
    "sp": "sequence-parallel",
    "recompute": "recompute-granularity",
}
OVERLAP = "overlap-grad-reduce overlap-param-gather"
# processes -> layout -> cases
JOBS = {
    2: {
        "tp=2": [BASIC, WIDE],
        "tp=2 sp recompute=selective recompute-modules=core_attn,mlp,layernorm": [BASIC, WIDE],
        "pp=2 first=1": [BASIC],
        "pp=2 pipeline-split=auto": [WIDE],
        "pp=2 vp=2": [BASIC],
        "pp=2 vp=3 recompute=full": [WIDE],
        f"dp=2 {OVERLAP}": [BASIC],
        "cp=2 recompute=full recompute-vit": [BASIC, WIDE],
        "ep=2": [BASIC, WIDE],
    },
    4: {
        "cp=4": [WIDE],  # more ranks than key heads
        "tp=2 cp=2 sp": [BASIC],
        "tp=2 pp=2 sp last=4": [WIDE],
        "cp=2 pp=2 vp=2": [BASIC],
        f"ep=4 und-expert-ranks=1 {OVERLAP}": [BASIC],
        "tp=2 ep=2 pp=2": [WIDE],
    },
}


def options(layout: str) -> str:
    """The tool's options of a layout in short form."""
    words = []
    for word in layout.split():
        name, _, value = word.partition("=")
        words += [f"--{SHORT.get(name, name)}", *value.split(",")] if value else [f"--{SHORT.get(name, name)}"]
    return " ".join(words)


def lines(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def check_parity(*arguments: object) -> subprocess.CompletedProcess:
    program = [sys.executable, str(ROOT / "tools" / "check_parity.py"), *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("processes", JOBS)
def test_golden_cases_pass_on_every_layout(processes):
    jobs = [f"{case} {options(layout)}" for layout, cases in JOBS[processes].items() for case in cases]
    reports = lines(launch_ok(PROGRAM, "layouts", *jobs, processes=processes, timeout=400))
    assert [r["job"] for r in reports] == jobs
    assert [r for r in reports if not r["pass"]] == []


@pytest.mark.parametrize("case", ["public-basic", "public-wide"])
def test_program_passes_on_one_process_and_prints_one_line(case):
    result = check_parity(GOLDEN / case)
    assert result.returncode == 0, result.stderr
    (report,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert report["pass"]
    assert all(g["error"] <= g["tolerance"] and g["checked"] > 0 for g in report["groups"].values())
    wanted = (
        "vae timesteps vit llm_input layer_out last_hidden_state ce mse losses gradients trajectory final ema infer"
    )
    assert set(wanted.split()) == set(report["groups"])


def test_every_kind_of_expected_value_is_noticed_when_off_by_one_percent():
    (report,) = lines(launch_ok(PROGRAM, "sensitivity", processes=1, timeout=240))
    assert report["changes"] > 100
    assert report["unnoticed"] == []


def altered_copy(folder: Path, file: str, name: str) -> Path:
    """A copy of public-basic with one tensor of a file scaled by 1.01."""
    copy = folder / "case"
    shutil.copytree(GOLDEN / "public-basic", copy)
    tensors = load_file(copy / file)
    tensors[name] = tensors[name] * 1.01
    (copy / file).unlink()
    save_file(tensors, copy / file)
    return copy


def test_program_fails_on_two_processes_when_an_input_is_off_by_one_percent(tmp_path):
    result = check_parity(
        altered_copy(tmp_path, "expected.safetensors", "traj.noise"), "--tensor-model-parallel-size", 2
    )
    assert result.returncode == 1, result.stderr
    report = json.loads(result.stdout)
    failed = {name for name, group in report["groups"].items() if group["error"] > group["tolerance"]}
    assert failed == {"trajectory", "final", "ema"}


def test_missing_file_is_one_sentence(tmp_path):
    result = check_parity(tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    message = [line for line in result.stderr.splitlines() if line]
    assert "has no meta.json; a case holds ckpt/, batch.safetensors, expected.safetensors" in message[-1]
