"""Writes what a step measured: `metrics.jsonl`, console, TensorBoard and the like. Used by the rank with the losses.

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
from megabagel.training.metrics_file import CONFIG_FILE, METRICS_FILE, drop_later_steps, record_repetition
from megabagel.training.outlets import Outlets

if TYPE_CHECKING:  # readers of metrics files need no model
    from megabagel.training.histograms import Histogram
    from megabagel.training.samples import Sample

_SAVES = {"save_time", "save_blocked_time"}  # measured at single steps, which may be others than those that are shown


class MetricsWriter:
    """`write` once a step, `close` at the end. `start_step`: the step that the run resumes from, 0 for a new one."""

    def __init__(self, run_dir: Path, config: Config, start_step: int, train_steps: int) -> None:
        """Creates `run_dir`, saves the resolved config there and drops lines about steps after `start_step`."""
        run_dir.mkdir(parents=True, exist_ok=True)
        text = to_yaml(config)
        (run_dir / CONFIG_FILE).write_text(text, encoding="utf-8")
        self._run_dir, self._file = run_dir, run_dir / METRICS_FILE
        self._drop(start_step)
        self._lines = self._file.open("a", encoding="utf-8")
        self._outlets = Outlets(config.logging, run_dir, text)
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
            record["mfu_official"] = values.get("official_tflops_per_device", 0.0) / self._peak
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
        if is_shown or validation or _SAVES & values.keys():
            self._outlets.call("write", step, record)

    def write_samples(self, step: int, samples: Sequence["Sample"]) -> None:
        """Show what the model made after step number `step`."""
        for sample in samples:
            name = f"{sample.number:03d} {sample.request.text[:60]}"
            self._outlets.call("write_sample", step, name, sample.picture, sample.answer)

    def write_histograms(self, step: int, histograms: Mapping[str, "Histogram"]) -> None:
        """Draw those of step number `step`, by the names of `histograms.measure`."""
        for name, histogram in histograms.items():
            self._outlets.call("write_histogram", step, name, histogram)

    def rewind(self, step: int) -> None:
        """The run goes on after `step`: drop the lines about later ones."""
        self._lines.close()
        self._drop(step)
        self._lines = self._file.open("a", encoding="utf-8")
        self._console.advance(step)

    def close(self) -> None:
        """Flush everything; safe to call twice."""
        self._console.close()
        self._lines.close()
        self._outlets.close()

    def _drop(self, last_step: int) -> None:
        if dropped := drop_later_steps(self._file, last_step):
            record_repetition(self._run_dir, dropped)
