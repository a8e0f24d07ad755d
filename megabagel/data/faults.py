"""Bad rows: counted per group and kind, listed in a file and logged, never fatal one by one and never silent.

What is wrong with the configuration is not a fault: that is a `DataError` and stops the run.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

logger = logging.getLogger(__name__)

FAULTS_FILE = "data_faults.jsonl"  # in the run folder
MIN_ROWS = 100  # of a group before its share of bad rows is judged
LOGGED_PER_KIND = 5  # of a group; then one line each time the number has grown tenfold
LISTED_ROWS_KNOWN = 200_000  # listed rows that are remembered, so that later passes do not list them again
NUM_EXAMPLES = 3


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
    key: tuple[int, ...] | None = None  # of the sample: group, row, visit

    def __str__(self) -> str:
        """For people: what is no valid Unicode (names of files may not be) is escaped, or no terminal could show it."""
        text = f"{self.origin}: {self.message} [{self.kind}]"
        return text.encode("utf-8", "backslashreplace").decode()


class FaultLog:
    """Counts good and bad rows of each group and gives up when too many are bad, or all of a pass.

    Every row that is drawn is told to it once, as `good` or as `bad`; `late` takes a `good` back.
    """

    def __init__(
        self,
        rows_per_pass: dict[str, int],
        max_bad_fraction: float = 1.0,
        file: Path | None = None,
        *,
        say: bool = True,
    ) -> None:
        """`rows_per_pass`: group -> number of rows. `max_bad_fraction`: of a group's rows. `file`: where bad rows are
        listed, a JSON object per line; those of an earlier run stay. `say`: log them too."""
        self.rows_per_pass = rows_per_pass
        self.num_good: Counter[str] = Counter()
        self.num_bad: dict[str, Counter[str]] = {group: Counter() for group in rows_per_pass}
        self.num_bad_files: dict[str, Counter[str]] = {group: Counter() for group in rows_per_pass}
        self.bad_in_a_row: Counter[str] = Counter()
        self._limit, self._say = max_bad_fraction, say
        self._list = None if file is None else FaultList(file)
        self._examples: dict[str, dict[str, Fault]] = {group: {} for group in rows_per_pass}

    def file_fault(self, group: str, fault: Fault) -> None:
        """Report a fault of a whole file, found while opening the group. It is no row: the limit does not count it."""
        self.num_bad_files[group][fault.kind] += 1
        self._report(group, fault, self.num_bad_files[group][fault.kind])

    def good(self, group: str) -> None:
        """Count a usable row."""
        self.num_good[group] += 1
        self.bad_in_a_row[group] = 0

    def bad(self, group: str, fault: Fault) -> None:
        """Count and report a skipped row. Raises DataError when too many of the group's rows are bad."""
        self.bad_in_a_row[group] += 1
        self._count(group, fault)

    def late(self, group: str, fault: Fault) -> None:
        """`bad` for a row that was counted as `good` before its fault was found. Others may have come between."""
        self.num_good[group] -= 1
        self._count(group, fault)

    def counts(self) -> dict[str, dict[str, int]]:
        """Bad rows and files so far: group -> kind -> number."""
        return {group: dict(rows + self.num_bad_files[group]) for group, rows in self.num_bad.items()}

    def state_dict(self) -> dict:
        return {
            "num_good": dict(self.num_good),
            "num_bad": {group: dict(kinds) for group, kinds in self.num_bad.items()},
            "num_bad_files": {group: dict(kinds) for group, kinds in self.num_bad_files.items()},
            "bad_in_a_row": dict(self.bad_in_a_row),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue these counts. Files were opened again, so faults of files are those found now."""
        self.num_good = Counter(state["num_good"])
        self.num_bad = {group: Counter(state["num_bad"].get(group, {})) for group in self.rows_per_pass}
        self.bad_in_a_row = Counter(state["bad_in_a_row"])

    def _count(self, group: str, fault: Fault) -> None:
        self.num_bad[group][fault.kind] += 1
        self._report(group, fault, self.num_bad[group][fault.kind])
        self._judge(group, fault)

    def _report(self, group: str, fault: Fault, number: int) -> None:
        """`number`: faults of this kind in the group so far."""
        if self._list:
            self._list.add(group, fault)
        if not self._say:
            return
        if number <= LOGGED_PER_KIND:
            logger.warning("%s: skipped %s", group, fault)
        elif number == 10 ** (len(str(number)) - 1):
            bad, rows = self._rows(group)
            logger.warning(
                "%s: %d times %s so far, %d of %d rows are bad; the last: %s",
                group,
                number,
                fault.kind,
                bad,
                rows,
                fault,
            )

    def _rows(self, group: str) -> tuple[int, int]:
        """Bad rows and all rows of a group so far."""
        bad = self.num_bad[group].total()
        return bad, bad + self.num_good[group]

    def _judge(self, group: str, fault: Fault) -> None:
        self._examples[group].setdefault(fault.kind, fault)
        bad, rows = self._rows(group)
        in_a_row = bad if bad == rows else self.bad_in_a_row[group]
        if in_a_row >= self.rows_per_pass[group]:
            raise DataError(
                f"group {group}: not one of {in_a_row} rows of a full pass can be used; "
                f"the last: {fault}. Fix the data or remove the group."
            )
        if rows >= MIN_ROWS and bad > self._limit * rows:
            raise DataError(self._summary(group, fault, bad, rows))

    def _summary(self, group: str, last: Fault, bad: int, rows: int) -> str:
        kinds = ", ".join(f"{kind} {n}" for kind, n in self.num_bad[group].most_common())
        firsts = [fault for fault in self._examples[group].values() if fault is not last]
        examples = "; ".join(str(fault) for fault in [last, *firsts][:NUM_EXAMPLES])
        where = self._list.path if self._list else f"{FAULTS_FILE} in the run folder"
        return (
            f"group {group}: {bad} of {rows} rows ({bad / rows:.1%}) cannot be used ({kinds}), more than "
            f"data.max_bad_fraction = {self._limit} allows; for example {examples}. All are listed in {where}: fix "
            "the data or raise data.max_bad_fraction."
        )


class FaultList:
    """The file that lists bad rows and files: {time, group, kind, origin, message, key} per line, each fault once.

    It is opened for every line, so that each line is complete on disk whatever happens next.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[int, None] = {}  # oldest first
        if path.exists():
            self._read()

    def add(self, group: str, fault: Fault) -> None:
        """Append the fault unless the file has it."""
        if not self._is_new(group, fault.kind, fault.origin):
            return
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "group": group,
            "kind": fault.kind,
            "origin": fault.origin,
            "message": fault.message,
        }
        if fault.key is not None:
            line["key"] = list(fault.key)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _is_new(self, *name: str) -> bool:
        known = hash(name)
        if known in self._known:
            return False
        self._known[known] = None
        if len(self._known) > LISTED_ROWS_KNOWN:
            del self._known[next(iter(self._known))]
        return True

    def _read(self) -> None:
        """Remember what an earlier run listed; a last line that a kill cut short goes."""
        whole = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                try:
                    entry = json.loads(line)
                    self._is_new(entry["group"], entry["kind"], entry["origin"])
                except (ValueError, KeyError, TypeError):
                    continue  # not ours: left as it is
        if whole < self.path.stat().st_size:
            with self.path.open("r+b") as file:
                file.truncate(whole)


def log_values(state: dict) -> dict[str, int]:
    """What the logs show of `FaultLog.state_dict()`, by the names of metrics and TensorBoard tags.

    `skipped_samples`: bad rows. `data/samples/GROUP`: usable rows drawn. `data/faults/KIND` and
    `data/faults/GROUP/KIND`: bad rows and files of that kind, in all groups and in one.
    """
    values = {"skipped_samples": sum(sum(kinds.values()) for kinds in state["num_bad"].values())}
    totals: Counter[str] = Counter()
    for group, number in state["num_good"].items():
        values[f"data/samples/{group}"] = number
    for group, rows in state["num_bad"].items():
        for kind, number in (Counter(rows) + Counter(state["num_bad_files"].get(group, {}))).items():
            values[f"data/faults/{group}/{kind}"] = number
            totals[kind] += number
    return values | {f"data/faults/{kind}": number for kind, number in totals.items()}
