"""The converters on a random checkpoint of real BAGEL-7B shapes: bits, memory per process, speed against `cp`.

    python tools/bench_convert.py --folder /scratch/bench                     4 of 28 layers, 7 GB; needs 4 times that
    python tools/bench_convert.py --folder /scratch/bench --layers 1 --hidden 448
    python tools/bench_convert.py --folder /scratch/bench --layout 2 2        and through 4 processes, TP 2 x PP 2

A folder goes to a checkpoint and back; both folders must be equal byte by byte. `cp` copies the same weights right
before each direction. The converters bring their files to the disk (fsync); `cp` is measured with and without that.
With --layout the folder is also loaded by a model in that layout, which is saved without an optimizer and exported.
Times are without the start of Python. The last line is JSON.
"""

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

from baseline.random_bagel import write_random_bagel  # noqa: E402

from megabagel.config.schema import ModelConfig  # noqa: E402

MIB = 2**20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="empty or new folder for all files")
    parser.add_argument("--layers", type=int, default=4, help="of 28")
    parser.add_argument("--hidden", type=int, default=3584, help="smaller for a quick try; a multiple of 448")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layout", type=int, nargs=2, metavar=("TENSOR", "PIPELINE"), help="also through such a model")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)  # what a measured process does
    arguments = parser.parse_args(argv)
    if arguments.part:
        _part(*arguments.part, arguments.processes)
        return 0
    home = arguments.folder
    home.mkdir(parents=True, exist_ok=True)
    model = shape(arguments.hidden, arguments.layers)
    largest = write_random_bagel(home / "hf", model)
    size = (home / "hf" / "ema.safetensors").stat().st_size
    print(f"{size / 1e9:.2f} GB of weights, the largest tensor {largest / MIB:.0f} MiB", flush=True)
    results = [_round(home, arguments.processes) for _ in range(arguments.repeats)]
    print(f"equal byte by byte: HF -> checkpoint -> HF, {arguments.repeats} times", flush=True)
    if arguments.layout:
        _through_a_model(home, *arguments.layout)
        print(
            f"equal byte by byte: HF -> tensor, pipeline {arguments.layout}, saved without optimizer -> HF", flush=True
        )
    shutil.rmtree(home / "hf")
    limit = 3 * largest / MIB + 500
    report = {"bench": "convert", "bytes": size, "layers": arguments.layers, "processes": arguments.processes}
    ratios, units = {}, {}
    for name in ("import", "export"):
        peaks = [result[name]["peak_mib"] for result in results]
        units[f"{name} peak MiB per process"] = _spread(peaks)
        units[f"{name} MB/s"] = _spread([size / result[name]["seconds"] / 1e6 for result in results])
        ratios[f"{name} peak of the limit"] = max(peaks) / limit
        for kind in ("cp", "cp+fsync"):
            pairs = [result[f"{kind} before {name}"] / result[name]["seconds"] for result in results]
            ratios[f"{name} speed of {kind}"] = _spread(pairs)
            units[f"{kind} before {name} MB/s"] = _spread([size / r[f"{kind} before {name}"] / 1e6 for r in results])
    print(json.dumps(report | {"limit_mib": limit, "ratios": ratios, "units": units}))
    return 0


def shape(hidden: int, layers: int) -> ModelConfig:
    """BAGEL-7B, with fewer layers and perhaps narrower."""
    model, share = ModelConfig(num_layers=layers), 3584 // hidden
    vit = replace(model.vit, hidden_size=1152 // share, ffn_hidden_size=4304 // share)
    return replace(model, hidden_size=hidden, ffn_hidden_size=18944 // share, vocab_size=152064 // share, vit=vit)


def _round(home: Path, processes: int) -> dict:
    result = {}
    for name, source, target in (("import", "hf", "dist"), ("export", "dist", "out")):
        result[f"cp before {name}"], result[f"cp+fsync before {name}"] = _copy(home)
        result[name] = _measured(name, home / source, home / target, processes)
        print(f"  {name}: {result[name]}, cp {result[f'cp before {name}']:.2f} s", flush=True)
    _require_equal(home / "hf", home / "out")
    shutil.rmtree(home / "dist")
    shutil.rmtree(home / "out")
    return result


def _copy(home: Path) -> tuple[float, float]:
    """Seconds of `cp` of the weights, and with the copy brought to the disk."""
    begin = time.perf_counter()
    subprocess.run(["cp", home / "hf" / "ema.safetensors", home / "copy"], check=True)
    plain = time.perf_counter() - begin
    subprocess.run(["sync", home / "copy"], check=True)
    durable = time.perf_counter() - begin
    (home / "copy").unlink()
    return plain, durable


def _measured(name: str, source: Path, target: Path, processes: int) -> dict[str, float]:
    """Seconds of the work in a process of its own, and the peak of the largest process that took part."""
    command = [sys.executable, __file__, "--folder", target.parent, "--processes", str(processes)]
    process = subprocess.Popen([*command, "--part", name, source, target], stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} failed")
    return {"seconds": float(output.splitlines()[-1]), "peak_mib": usage.ru_maxrss / 1024}


def _part(name: str, source: str, target: str, processes: int) -> None:
    from megabagel.checkpoint.export import export
    from megabagel.checkpoint.export_plan import plan_export
    from megabagel.checkpoint.import_folder import import_folder, plan_import

    plan = plan_import(source, target) if name == "import" else plan_export(source, target)
    begin = time.perf_counter()
    (import_folder if name == "import" else export)(plan, processes)
    print(time.perf_counter() - begin)


def _through_a_model(home: Path, tensor: int, pipeline: int) -> None:
    program = ROOT / "tools" / "baseline" / "resave.py"
    options = ["--weights", home / "hf", "--out", home / "run", "--tensor", str(tensor), "--pipeline", str(pipeline)]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(tensor * pipeline),
    ]
    subprocess.run([*launcher, program, *options], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _measured("export", home / "run", home / "out", 1)
    _require_equal(home / "hf", home / "out")
    shutil.rmtree(home / "run")
    shutil.rmtree(home / "out")


def _require_equal(left: Path, right: Path) -> None:
    names = sorted(path.name for path in left.iterdir())
    if names != sorted(path.name for path in right.iterdir()):
        raise SystemExit(f"{left} and {right} hold other files")
    _, different, unreadable = filecmp.cmpfiles(left, right, names, shallow=False)
    if different or unreadable:
        raise SystemExit(f"{left} and {right} differ in {different + unreadable}")


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values)}


if __name__ == "__main__":
    sys.exit(main())
