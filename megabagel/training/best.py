"""The best validation so far and how long ago it was; when to end a run that no longer gets better.

Numbers only: which checkpoints are kept is the matter of `megabagel.checkpoint`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class Best:
    """Of `metric`, for which less is better. `patience`: validations in a row without a better value that end the run;
    None: they never do."""

    metric: str
    patience: int | None = None
    value: float = math.inf
    step: int = 0  # of the best value; 0: there is none yet
    stale: int = 0  # validations since then

    def update(self, step: int, values: Mapping[str, float | None]) -> bool:
        """Take note of the validation after `step`; whether it is the best so far. What is not a number is not."""
        value = values.get(self.metric)
        if value is None or not value < self.value:
            self.stale += 1
            return False
        self.value, self.step, self.stale = value, step, 0
        return True

    @property
    def is_exhausted(self) -> bool:
        """Whether the run has gone on long enough without getting better."""
        return self.patience is not None and self.stale >= self.patience

    def sentence(self) -> str:
        """Why the run ends."""
        best = f"the best was {self.value:.6g} after step {self.step}" if self.step else "it never had a value"
        return (
            f"{self.metric} has not improved in {self.stale} validations ({best}); to train on, raise "
            "validation.patience or set it to null"
        )

    def state_dict(self) -> dict[str, float]:
        """Numbers for a checkpoint; none before the first validation."""
        if not self.step and not self.stale:
            return {}
        return {"validation_best": self.value, "validation_best_step": self.step, "validation_stale": self.stale}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from `state`, in which other numbers may be; from nothing where it was saved without validation."""
        self.value = state.get("validation_best", math.inf)
        self.step = int(state.get("validation_best_step", 0))
        self.stale = int(state.get("validation_stale", 0))
