"""Writes what a step measured: `metrics.jsonl`, TensorBoard and the console. Used by one rank, which holds the losses.

It formats and stores; it computes nothing but MFU. A loss that no token of a step carries is null, never 0.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megabagel.config.load import to_yaml
from megabagel.config.schema import Config
from megabagel.training.console import Console
from megabagel.training.flops import peak_tflops
from megabagel.training.tensorboard import TensorBoard

if TYPE_CHECKING:  # readers of metrics files need no model
    from megabagel.training.samples import Sample

_SAVES = {"save_time", "save_blocked_time"}  # measured at single steps, which may be others than those that are shown
METRICS_FILE, CONFIG_FILE, TENSORBOARD_FOLDER = "metrics.jsonl", "config.yaml", "tensorboard"


class MetricsWriter:
    """`write` once a step, `close` at the end. `start_step`: the step that the run resumes from, 0 for a new one."""

    def __init__(self, run_dir: Path, config: Config, start_step: int, train_steps: int) -> None:
        """Creates `run_dir`, saves the resolved config there and drops lines about steps after `start_step`."""
        run_dir.mkdir(parents=True, exist_ok=True)
        text = to_yaml(config)
        (run_dir / CONFIG_FILE).write_text(text, encoding="utf-8")
        drop_later_steps(run_dir / METRICS_FILE, start_step)
        self._lines = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._tensorboard = TensorBoard(run_dir / TENSORBOARD_FOLDER, text) if config.logging.tensorboard else None
        self._console = Console(start_step, train_steps, config.logging.progress_bar)
        self._interval = config.logging.log_interval
        self._global_batch_size = config.training.global_batch_size
        self._peak = config.logging.peak_tflops
        if self._peak is None and torch.cuda.is_available():
            self._peak = peak_tflops(torch.cuda.get_device_name(), config.training.params_dtype)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Record step number `step` (the first is 1). `values` by the names of `training.loop`; None: not measured.

        Every step becomes one line of the file; console and TensorBoard follow `logging.log_interval`, but every
        validation is shown.
        """
        record: dict[str, float | None] = {"step": step, **values, "batch_size": self._global_batch_size}
        if self._peak is not None and (tflops := values.get("tflops_per_device")) is not None:
            record["mfu"] = tflops / self._peak
        record["time"] = time.time()
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        self._console.advance(step)
        is_shown = step % self._interval == 0
        if is_shown:
            self._console.show(step, record)
        validation = {name: value for name, value in record.items() if name.startswith("validation/")}
        if validation:
            self._console.show_validation(step, validation)
        if self._tensorboard and (is_shown or validation or _SAVES & values.keys()):
            self._tensorboard.write(step, record)

    def write_samples(self, step: int, samples: Sequence["Sample"]) -> None:
        """Show in TensorBoard what the model made after step number `step`."""
        for sample in samples if self._tensorboard else ():
            name = f"{sample.number:03d} {sample.request.text[:60]}"
            self._tensorboard.write_sample(step, name, sample.picture, sample.answer)

    def close(self) -> None:
        """Flush everything; safe to call twice."""
        self._console.close()
        self._lines.close()
        if self._tensorboard:
            self._tensorboard.close()


def drop_later_steps(path: Path, last_step: int) -> None:
    """Remove lines about steps after `last_step`, and a last line that a kill cut short, so each step appears once."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    if last_step == 0 and path.stat().st_size:  # a new run in an old folder: keep what the old one measured
        path.replace(path.with_name(f"metrics.before-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"))
        return
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(kept), encoding="utf-8")
    replacement.replace(path)


def read_metrics(run_dir: Path) -> list[dict[str, float | None]]:
    """All complete lines of a run's metrics file in order of steps; a line still being written is left out."""
    records = []
    for line in (run_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return sorted(records, key=lambda record: record["step"])
