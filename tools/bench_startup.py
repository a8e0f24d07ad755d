"""Memory of a run's start: peak of every rank against the bytes that it keeps and the largest tensor.

    python tools/bench_startup.py
    python tools/bench_startup.py --layout tp=2 --hidden 1024

Starts runs from scratch, from a BAGEL folder and from a checkpoint (written by one process), in processes of their
own, up to the moment before the first step. Memory is resident memory above that of a process whose imports are done
and whose process groups have met, pages of mapped files included. `state` is what a rank keeps: parameters, gradients,
main parameters, moments (after a resume) and moving average. `overshoot` is (peak - state) in largest tensors, counted
in float32. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

from megabagel.config.load import load_config  # noqa: E402
from megabagel.config.schema import Config  # noqa: E402

LAYOUTS = {
    "1": {},
    "tp=2": {"tensor_model_parallel_size": 2},
    "pp=2": {"pipeline_model_parallel_size": 2},
    "dp=2": {},
}
STARTS = ("scratch", "folder", "resume")


def small_config(arguments: argparse.Namespace, layout: str, folder: Path, start: str) -> Config:
    """The demo's model, widened, in bfloat16."""
    preset = ROOT / "megabagel" / "config" / "presets" / "demo.yaml"
    config = load_config(["--config", str(preset)])
    config.model.hidden_size, config.model.num_layers = arguments.hidden, arguments.layers
    config.model.ffn_hidden_size, config.model.vocab_size = 3 * arguments.hidden, arguments.vocab
    config.model.num_attention_heads, config.model.num_query_groups = 8, 4
    config.training.params_dtype = "bf16"
    config.validation.interval = 0
    config.optimizer.ema_decay = 0.99
    config.parallel.tensor_model_parallel_size = 1
    for name, value in LAYOUTS[layout].items():
        setattr(config.parallel, name, value)
    config.checkpoint.init_vae = str(ROOT / "examples" / "demo" / "autoencoder")
    config.checkpoint.init_from = str(folder / "bagel") if start == "folder" else None
    config.checkpoint.run_dir = str(folder / ("run" if start == "resume" else "new"))
    return config


def launch(arguments: argparse.Namespace, layout: str, folder: Path, start: str) -> None:
    """Run this file on the ranks of the layout."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={1 if layout == '1' else 2}", __file__, "--rank-of", layout, start, str(folder)]
    for name in ("hidden", "layers", "vocab"):
        command += [f"--{name}", str(getattr(arguments, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        sys.exit(f"{start} in {layout} failed:\n{result.stdout}")


def measure(arguments: argparse.Namespace, layout: str, folder: Path, start: str) -> list[dict[str, float]]:
    """What each rank reports, in bytes; see `startup/program.py`."""
    launch(arguments, layout, folder, start)
    files = sorted(folder.glob(f"{start}-*.json"))
    reports = [json.loads(file.read_text()) for file in files]
    for file in files:
        file.unlink()
    return reports


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, help_text in (
        ("hidden", 512, "hidden size; MLPs are three times as wide"),
        ("layers", 8, "decoder layers, each with two sets of weights"),
        ("vocab", 32000, "rows of the embedding and of the head"),
        ("repeats", 3, "starts of each kind"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{help_text} ({default})")
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="may be repeated (all)")
    parser.add_argument("--start", action="append", choices=STARTS, help="may be repeated (all)")
    parser.add_argument("--rank-of", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_rank(arguments: argparse.Namespace) -> None:
    from startup import program  # only here: it imports the trainer

    layout, start, folder = arguments.rank_of
    config = small_config(arguments, layout, Path(folder), start)
    if start == "prepare":
        program.prepare(config, Path(folder))
    else:
        program.start(config, Path(folder) / start)


def main() -> None:
    arguments = parse()
    if arguments.rank_of:
        run_rank(arguments)
        return
    ratios, units = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launch(arguments, "1", folder, "prepare")
        for layout in arguments.layout or LAYOUTS:
            for start in arguments.start or STARTS:
                runs = [measure(arguments, layout, folder, start) for _ in range(arguments.repeats)]
                worst = [max(run, key=lambda rank: rank["peak"] - rank["state"]) for run in runs]
                over = [(rank["peak"] - rank["state"]) / rank["largest"] for rank in worst]
                share = [rank["peak"] / rank["state"] for rank in worst]
                mib = {key: median(rank[key] for rank in worst) / 2**20 for key in worst[0]}
                print(
                    f"{layout}, {start}: peak {mib['peak']:.0f} MiB, at the end {mib['end']:.0f}, state "
                    f"{mib['state']:.0f}, largest tensor {mib['largest']:.0f}; peak/state {median(share):.3f} "
                    f"({min(share):.3f} to {max(share):.3f}), overshoot {median(over):.2f} "
                    f"({min(over):.2f} to {max(over):.2f})",
                    flush=True,
                )
                ratios[f"{layout}, {start}: peak / state"] = round(median(share), 3)
                ratios[f"{layout}, {start}: overshoot"] = round(median(over), 3)
                units[f"{layout}, {start}: peak / state"] = "ratio"
                units[f"{layout}, {start}: overshoot"] = "largest tensors"
    print(json.dumps({"bench": "startup", "ratios": ratios, "units": units}))


if __name__ == "__main__":
    main()
