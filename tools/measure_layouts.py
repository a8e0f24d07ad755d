"""Measures what a parallel layout costs: bytes kept per rank and bytes sent per step, beside the formulas for both.

It starts its own processes on this machine, trains two steps of a small model in each layout through the trainer's own
code, prints Markdown tables and, as the last line, JSON. Times are not its matter: a CPU says nothing about those. The
same formulas for any model and cluster: tools/plan_parallelism.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

from layouts.choice import DEFAULT, Choice, check_layout, parse_choice  # noqa: E402

from megabagel.config.errors import ConfigError  # noqa: E402

RESULT = "MEGABAGEL_LAYOUTS_RESULT"  # file that rank 0 writes to; set in the processes that this program starts
EXAMPLE = """examples:
  python tools/measure_layouts.py                                        # the default table, 8 processes
  python tools/measure_layouts.py --layout tp=2,sp --layout ep=2 --processes 4

a layout: dp (data parallel only), tp=N, sp, pp=N, vp=N, first=N, last=N, cp=N, ep=N, und_ranks=N, overlap,
experts=N (sparse experts per stream), recompute=full|selective, joined by commas
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", action="append", metavar="L", help="may be repeated; default: a table of layouts")
    parser.add_argument("--processes", type=int, default=8, metavar="N", help="ranks that share the model (default 8)")
    parser.add_argument("--packs", type=int, default=8, metavar="N", help="of a step, over all replicas (default 8)")
    options = parser.parse_args(argv)
    try:
        options.choices = {text: parse_choice(text) for text in options.layout or DEFAULT}
    except ValueError as error:
        parser.error(str(error))
    return options


def measure(names: list[str], processes: int, packs: int) -> dict[str, list[dict]] | None:
    """Reports of every rank by layout; None when a process failed (it says why on standard error)."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]))
        environment = {"OMP_NUM_THREADS": "1", **os.environ, RESULT: str(result), "PYTHONPATH": path}
        command = [sys.executable, "-W", "ignore"]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [__file__, f"--packs={packs}", *(f"--layout={name}" for name in names)]
        code = subprocess.run(command, env=environment, stdout=sys.stderr).returncode
        return None if code else json.loads(result.read_text())


def with_baselines(choices: dict[str, Choice]) -> dict[str, Choice]:
    """The choices, and before them the layouts that they are compared with."""
    baselines = [choice.baseline for choice in choices.values()]
    return {name: parse_choice(name) for name in dict.fromkeys([*baselines, *choices])}


def main(argv: list[str]) -> int:
    options = parse(argv)
    if RESULT in os.environ:
        from layouts.program import run

        run(list(options.choices), options.packs, Path(os.environ[RESULT]))
        return 0
    from layouts.tables import formulas, memory_table, mlp_table, peak_table, ratios, traffic_table
    from layouts.workload import small_config

    choices = with_baselines(options.choices)
    try:
        for choice in choices.values():
            check_layout(choice.apply(small_config(options.packs)), options.processes)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    reports = measure(list(choices), options.processes, options.packs)
    if reports is None:
        return 1
    expected_memory, expected_peaks, expected_traffic = formulas(choices, options.processes, options.packs)
    experts = [name for name, choice in choices.items() if choice.parallel.get("expert_model_parallel_size")]
    print(f"MB per rank, {options.processes} ranks: fullest rank (emptiest rank)\n")
    print(memory_table(reports, expected_memory))
    print("\nMB at the peak of forward and backward, the fullest rank\n")
    print(peak_table(reports, expected_peaks))
    print("\nMB sent per step, the rank that sends most of a kind: measured / formula\n")
    print(traffic_table(reports, expected_traffic))
    if experts:
        print("\nMB of the decoder's MLPs per rank\n")
        print(mlp_table(reports, list(dict.fromkeys([*(choices[name].baseline for name in experts), *experts]))))
    found = ratios(reports, choices)
    units = dict.fromkeys(found, "bytes of the fullest rank / of data parallelism alone, same model")
    print("\n" + json.dumps({"bench": "measure_layouts", "ratios": found, "units": units}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
