"""What an interrupted conversion has done so far: a file with a heading and one JSON line per finished unit of work."""

import json
from pathlib import Path

from megabagel.checkpoint.errors import CheckpointError


class Journal:
    """The file is in the target folder as long as that is not whole."""

    def __init__(self, path: Path, heading: str):
        """`heading` says what is converted and how; see `resume`."""
        self.path, self.heading = path, heading

    def begin(self) -> None:
        self.path.write_text(json.dumps(self.heading) + "\n", encoding="utf-8")

    def resume(self) -> dict[str, object] | None:
        """Results of the finished units by their names; None where nothing was begun.

        Raises CheckpointError when what was begun is another conversion.
        """
        if not self.path.is_file():
            return None
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        if not lines or not lines[0].endswith("\n"):  # killed before anything was written
            return None
        if json.loads(lines[0]) != self.heading:
            raise CheckpointError(
                f"{self.path.parent} holds the beginning of another export or import; delete it or take another folder"
            )
        whole = [line for line in lines[1:] if line.endswith("\n")]
        if whole != lines[1:]:  # a line cut short by a kill must not swallow the next one
            self.path.write_text("".join([lines[0], *whole]), encoding="utf-8")
        return dict(json.loads(line) for line in whole)

    def add(self, unit: str, result: object = None) -> None:
        """Note that `unit` is done; its result must be plain JSON."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([unit, result]) + "\n")

    def end(self) -> None:
        self.path.unlink()
