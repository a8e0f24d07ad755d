"""Draws the curves of a run from its metrics.jsonl into RUN_DIR/losses.png, held-out losses with them.

Example: python tools/plot_losses.py runs/demo
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from megabagel.training.metrics_file import read_metrics

PANELS = (
    ("ce", "cross entropy of text (nats per token)"),
    ("mse", "flow error of pictures (mean square)"),
    ("grad_norm", "gradient norm before clipping"),
    ("lr", "learning rate"),
)
HELD_OUT = (("validation/", "held out", "tab:orange"), ("validation/ema/", "held out, average", "tab:green"))


def points_of(records: list[dict], name: str) -> list[tuple[int, float]]:
    """Step and value where there is one."""
    return [(record["step"], record[name]) for record in records if record.get(name) is not None]


def smoothed(values: list[float]) -> list[float]:
    """Mean over a window around each value, a twentieth of the run wide, shorter at both ends."""
    half = max(1, len(values) // 40)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def plot(run_dir: Path, output: Path) -> None:
    """Write the picture; raises SystemExit with one sentence when the run has no metrics."""
    try:
        records = read_metrics(run_dir)
    except OSError as error:
        raise SystemExit(f"{run_dir} holds no metrics.jsonl ({error.strerror}); give the folder of a run.") from None
    if not records:
        raise SystemExit(f"{run_dir}/metrics.jsonl holds no step yet; try again once the run has done one.")
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), sharex=True, layout="constrained")
    for axis, (name, title) in zip(axes.flat, PANELS, strict=True):
        points = points_of(records, name)
        axis.set_title(title, fontsize=10, loc="left")
        axis.grid(alpha=0.3)
        if not points:
            axis.text(0.5, 0.5, "no step of this run has it", ha="center", va="center", transform=axis.transAxes)
            continue
        steps, values = map(list, zip(*points, strict=True))
        axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1)
        axis.plot(steps, smoothed(values), color="tab:blue", linewidth=1.8, label="training")
        for prefix, label, color in HELD_OUT:
            if held_out := points_of(records, prefix + name):
                axis.plot(*zip(*held_out, strict=True), "o-", color=color, markersize=4, linewidth=1, label=label)
                axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.suptitle(f"{run_dir.resolve().name}: {len(records)} steps")
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="folder of a run (checkpoint.run_dir)")
    parser.add_argument("--output", type=Path, help="the picture (default: RUN_DIR/losses.png)")
    arguments = parser.parse_args()
    output = arguments.output or arguments.run_dir / "losses.png"
    plot(arguments.run_dir, output)
    print(output)


if __name__ == "__main__":
    main()
