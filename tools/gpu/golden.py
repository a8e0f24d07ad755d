"""The golden cases on the GPU, through check_parity.py: forward values, gradients and training steps in float32."""

from pathlib import Path

import torch

from gpu.programs import run_tool
from gpu.report import Report, Skipped

CASES = Path(__file__).resolve().parents[2] / "tests" / "golden"


def run(report: Report, device: torch.device) -> None:
    cases = sorted(path.parent for path in CASES.glob("*/meta.json"))
    if not cases:
        raise Skipped(f"there are no cases in {CASES}.")
    for case in cases:
        report.begin(case.name)
        line, said = run_tool("check_parity.py", str(case))
        if line is None:
            report.row(case.name, False, said=said)
            continue
        errors = {name: group["error"] for name, group in line["groups"].items()}
        report.row(case.name, line["pass"], errors=errors)
