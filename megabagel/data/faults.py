"""Bad rows: counted per group and kind, logged with file and row, never fatal one by one and never silent.

What is wrong with the configuration is not a fault: that is a `DataError` and stops the run.
"""

import logging
from collections import Counter
from dataclasses import dataclass

logger = logging.getLogger(__name__)

WARN_FRACTION = 0.01  # of a group's rows
MIN_ROWS_TO_WARN = 100


class DataError(ValueError):
    """The data as a whole cannot be used; the message says what to do."""


class DataFault(Exception):
    """One row or file cannot be used. `kind` groups faults in the counts."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Fault:
    """What is reported about a skipped row or file."""

    kind: str
    origin: str  # file and row
    message: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.message} [{self.kind}]"


class FaultLog:
    """Counts good and bad rows of each group; complains at 1% and gives up when a whole pass is bad."""

    def __init__(self, rows_per_pass: dict[str, int]) -> None:
        """`rows_per_pass`: how many rows of each group this reader meets in one pass."""
        self.rows_per_pass = rows_per_pass
        self.num_good: Counter[str] = Counter()
        self.num_bad: dict[str, Counter[str]] = {group: Counter() for group in rows_per_pass}
        self.bad_in_a_row: Counter[str] = Counter()
        self._warned_at: Counter[str] = Counter()

    def file_fault(self, group: str, fault: Fault, *, say: bool = True) -> None:
        """Count a fault of a whole file, found while opening the group."""
        self.num_bad.setdefault(group, Counter())[fault.kind] += 1
        if say:
            logger.warning("%s: %s", group, fault)

    def good(self, group: str) -> None:
        """Count a usable row."""
        self.num_good[group] += 1
        self.bad_in_a_row[group] = 0

    def bad(self, group: str, fault: Fault) -> None:
        """Count and log a skipped row. Raises DataError once a full pass over the group held no usable row."""
        self.num_bad[group][fault.kind] += 1
        self.bad_in_a_row[group] += 1
        logger.warning("%s: skipped %s", group, fault)
        bad = self.num_bad[group].total()
        rows = bad + self.num_good[group]
        if rows >= MIN_ROWS_TO_WARN and bad > WARN_FRACTION * rows and bad >= 2 * self._warned_at[group]:
            self._warned_at[group] = bad
            kinds = ", ".join(f"{kind} {n}" for kind, n in self.num_bad[group].most_common())
            logger.warning("%s: %d of %d rows so far are bad (%s); check the data", group, bad, rows, kinds)
        if self.bad_in_a_row[group] >= self.rows_per_pass[group]:
            raise DataError(
                f"group {group}: not one of {self.bad_in_a_row[group]} rows of a full pass can be used; "
                f"the last: {fault}. Fix the data or remove the group."
            )

    def counts(self) -> dict[str, dict[str, int]]:
        """Bad rows and files so far: group -> kind -> number."""
        return {group: dict(kinds) for group, kinds in self.num_bad.items()}

    def state_dict(self) -> dict:
        return {
            "num_good": dict(self.num_good),
            "num_bad": self.counts(),
            "bad_in_a_row": dict(self.bad_in_a_row),
            "warned_at": dict(self._warned_at),
        }

    def load_state_dict(self, state: dict) -> None:
        self.num_good = Counter(state["num_good"])
        self.num_bad = {group: Counter(state["num_bad"].get(group, {})) for group in self.rows_per_pass}
        self.bad_in_a_row = Counter(state["bad_in_a_row"])
        self._warned_at = Counter(state["warned_at"])
