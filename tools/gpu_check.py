"""Checks megabagel on the GPU of this machine: builds the operators, compares every one and every attention backend
with its reference, trains the golden cases, and measures bandwidth and the layers of a 7B model.

    python tools/gpu_check.py                         # everything, under 8 minutes on one GPU
    python tools/gpu_check.py --only ops attention

Every section runs in a process of its own and gpu_results.json is written after each, so that a crash loses nothing.
What this machine cannot do is skipped and the file says why. Exit status 1 when a result is wrong; a speed that misses
its target is named but is no failure.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]


class Section(NamedTuple):
    """`module` of tools/gpu has run(report, device); it is stopped after `seconds`."""

    module: str
    seconds: int
    needs_gpu: bool
    what: str


SECTIONS = {
    "build": Section("building", 240, False, "compile csrc/ for this GPU"),
    "ops": Section("ops", 120, False, "operators against their references"),
    "attention": Section("attention", 120, True, "attention backends against each other"),
    "golden": Section("golden", 180, True, "forward values, gradients and training steps of the golden cases"),
    "precision": Section("precision", 120, True, "Transformer Engine in BF16 and FP8 against float32"),
    "bandwidth": Section("bandwidth", 60, True, "memory-bound operators beside a plain copy"),
    "layers": Section("layers", 180, True, "tools/bench_layers.py"),
}


def run_section(name: str, folder: Path) -> int:
    """The work of one section's process."""
    import torch
    from gpu.report import Report, Skipped

    report = Report(folder / "rows.jsonl")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if SECTIONS[name].needs_gpu and device.type != "cuda":
            raise Skipped("there is no GPU.")
        importlib.import_module(f"gpu.{SECTIONS[name].module}").run(report, device)
    except Skipped as reason:
        print(f"  skipped: {reason}", flush=True)
        report.skip(str(reason))
    return 0


def start_section(name: str) -> dict:
    """Run a section in a process of its own -> its entry of the results."""
    from gpu.report import read_section

    print(f"{name}: {SECTIONS[name].what}", flush=True)
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", __file__, "--run-section", name, folder]
        start = time.monotonic()
        try:
            code = subprocess.run(
                command, env={**os.environ, "PYTHONPATH": path}, timeout=SECTIONS[name].seconds
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        return read_section(Path(folder) / "rows.jsonl", code, time.monotonic() - start)


def write(results: dict, path: Path) -> None:
    """Replace the file in one step."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def main(argv: list[str]) -> int:
    if argv[:1] == ["--run-section"]:
        return run_section(argv[1], Path(argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, default=Path("gpu_results.json"), help="default: gpu_results.json")
    options = parser.parse_args(argv)
    from gpu.machine import describe

    results = {**describe(), "sections": {}}
    for name in options.only or SECTIONS:
        entry = results["sections"][name] = start_section(name)
        write(results, options.out)
        print(f"{name}: {entry['status']} in {entry['seconds']} s", flush=True)
    failed, missed = (
        {name: entry[key] for name, entry in results["sections"].items() if entry[key]} for key in ("failed", "missed")
    )
    line = {"check": "gpu", "gpu": results["gpu"] and results["gpu"]["name"]}
    line |= {name: entry["status"] for name, entry in results["sections"].items()}
    print(json.dumps({**line, "failed": failed, "targets_missed": missed, "pass": not failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
