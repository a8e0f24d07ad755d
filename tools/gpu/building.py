"""Compiles csrc/ for this machine, into the package that the other sections import."""

import os
import sys
from pathlib import Path

import torch

from gpu.machine import own_architecture
from gpu.report import Report, Skipped

ROOT = Path(__file__).resolve().parents[2]


def run(report: Report, device: torch.device) -> None:
    sys.path.insert(0, str(ROOT / "csrc"))
    import build

    if device.type == "cuda":
        os.environ.setdefault("MEGABAGEL_CUDA_ARCHS", own_architecture())
    report.begin("build")
    try:
        libraries = build.build(ROOT / "megabagel" / "ops")
    except build.CannotBuild as error:
        report.row("build", False, reason=str(error))
        return
    if not libraries:
        raise Skipped("there is no compiler here: the references are all there is.")
    report.row("build", True, libraries=[path.name for path in libraries])
