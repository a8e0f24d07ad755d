"""One line a step on standard output and, on a terminal, a progress bar with the time left below it.

Formatting only; what is shown comes from the training loop.
"""

import sys
import time
from collections.abc import Mapping
from datetime import timedelta

from tqdm import tqdm


class Console:
    """Lines and bar of a run that goes from `start_step` to `train_steps`."""

    def __init__(self, start_step: int, train_steps: int, progress_bar: bool) -> None:
        self._start_step, self._train_steps = start_step, train_steps
        self._started: float | None = None  # end of the first step, which also pays for warming up
        self._bar = None
        if progress_bar and sys.stderr.isatty():
            self._bar = tqdm(total=train_steps, initial=start_step, unit="step", dynamic_ncols=True, desc="train")

    def advance(self, step: int) -> None:
        """Move the bar; call it every step."""
        if self._bar:
            self._bar.update(step - self._bar.n)

    def show(self, step: int, record: Mapping[str, float | None]) -> None:
        """Print the line of `step`."""
        self._print(self.line(step, record))

    def show_validation(self, step: int, values: Mapping[str, float | None]) -> None:
        """Print what the validation after `step` measured, a line for the live weights and one for their average."""
        names = ("loss", "ce", "perplexity", "mse")
        for prefix, title in (("validation/", "validation"), ("validation/ema/", "validation of the average")):
            if f"{prefix}loss" in values:
                parts = [f"{name} {_number(values[prefix + name], '.4f')}" for name in names]
                self._print(" | ".join([f"{title} after step {step}", *parts]))

    def _print(self, line: str) -> None:
        if self._bar:
            self._bar.write(line)
        else:
            print(line, flush=True)

    def line(self, step: int, record: Mapping[str, float | None]) -> str:
        """The text of a step; a dash stands for what was not measured."""
        now = time.monotonic()
        self._started = self._started or now
        width = len(str(self._train_steps))
        parts = [
            f"step {step:{width}d}/{self._train_steps}",
            f"ce {_number(record.get('ce'), '.4f')}",
            f"mse {_number(record.get('mse'), '.4f')}",
            f"lr {_number(record.get('lr'), '.2e')}",
            f"grad norm {_number(record.get('grad_norm'), '.3f')}",
            f"{_number(record.get('tokens_per_sec'), ',.0f')} tokens/s",
            f"{_number(record.get('step_time'), '.3f')} s/step",
        ]
        if skipped := record.get("skipped_samples"):
            parts.append(f"{skipped:,.0f} bad rows")
        if (done := step - self._start_step - 1) > 0:
            seconds = (now - self._started) / done * (self._train_steps - step)
            parts.append(f"left {timedelta(seconds=round(seconds))}")
        return " | ".join(parts)

    def close(self) -> None:
        """Leave the bar as it is and stop drawing it."""
        if self._bar:
            self._bar.close()


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
