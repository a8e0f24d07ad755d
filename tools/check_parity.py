"""Checks megabagel against a golden case: forward values, losses, gradients, five training steps and inference.

    python tools/check_parity.py tests/golden/public-basic --tensor-model-parallel-size 2 --sequence-parallel

It starts its own processes, prints one JSON line (worst relative error of each group) and exits 0 if all groups pass.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

from parity.layout import add_options, world_size  # noqa: E402

RESULT = "MEGABAGEL_PARITY_RESULT"  # file that rank 0 writes its line to; set in the processes that this program starts


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case_dir", help="folder with ckpt/, batch.safetensors, expected.safetensors and meta.json")
    add_options(parser)
    return parser.parse_args(argv)


def on_rank(options: argparse.Namespace, result: Path) -> None:
    """The work of one process; rank 0 writes the JSON line to `result`."""
    from parity.program import run

    run(options, result)


def main(argv: list[str]) -> int:
    options = parse(argv)
    if RESULT in os.environ:
        on_rank(options, Path(os.environ[RESULT]))
        return 0
    processes = world_size(options)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]))
        environment = {"OMP_NUM_THREADS": "1", **os.environ, RESULT: str(result), "PYTHONPATH": path}
        # the ranks may only speak on standard error: standard output is for the one line
        code = subprocess.run([*command, __file__, *argv], env=environment, stdout=sys.stderr).returncode
        if code or not result.is_file():
            return 1
        passed, line = result.read_text().split(" ", 1)
    print(line)
    return 0 if passed == "True" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
