"""What a section found, row after row on disk, so that a crash loses nothing. It judges nothing."""

import json
from pathlib import Path


class Skipped(Exception):
    """The section, or the rest of it, cannot run here; the message says why in one sentence."""


class Report:
    """A file of JSON lines: {"begin": name}, then {"row": name, "pass": true, false or null, ...}.

    A row is begun before its work, so that the one that brought the process down is known. `pass` null: a measurement,
    which may miss its target ("met": false) without being wrong.
    """

    def __init__(self, path: Path):
        self.path = path

    def _append(self, line: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def begin(self, name: str) -> None:
        self._append({"begin": name})

    def row(self, name: str, passed: bool | None, **values: object) -> None:
        mark = {True: "ok  ", False: "FAIL", None: "    "}[passed]
        print(f"  {mark} {name}", *(f"{key}={value}" for key, value in values.items()), flush=True)
        self._append({"row": name, "pass": passed, **values})

    def measured(self, name: str, value: float, target: float, **values: object) -> None:
        """A number that should be at least `target`."""
        self.row(name, None, value=float(f"{value:.4g}"), target=target, met=value >= target, **values)

    def skip(self, reason: str) -> None:
        self._append({"skipped": reason})


def read_section(path: Path, code: int, seconds: float) -> dict:
    """The file of a section and how its process ended (None: it took too long) as one entry of the results."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    rows = [{**line, "name": line["row"]} for line in lines if "row" in line]
    for row in rows:
        del row["row"]
    reasons = [line["skipped"] for line in lines if "skipped" in line]
    failed = [row["name"] for row in rows if row["pass"] is False]
    if code != 0:
        begun = [line["begin"] for line in lines if "begin" in line]
        how = "took too long" if code is None else f"ended with status {code}"
        failed.append(f"the process {how}" + (f" in {begun[-1]}" if begun else ""))
    return {
        "status": "failed" if failed else "passed" if rows else "skipped",
        "seconds": round(seconds, 1),
        "failed": failed,
        "missed": [row["name"] for row in rows if row.get("met") is False],
        "skipped": reasons,
        "rows": rows,
    }
