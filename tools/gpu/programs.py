"""Runs another program of tools/ and reads the JSON of its last line."""

import json
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1]
_KEPT = 20  # lines of what a program that failed said last


def run_tool(name: str, *arguments: str) -> tuple[dict | None, str]:
    """-> the JSON, None where there is none, and the end of its standard error."""
    command = [sys.executable, "-W", "ignore", str(TOOLS / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    said = "\n".join(done.stderr.splitlines()[-_KEPT:])
    lines = done.stdout.splitlines()
    try:
        return json.loads(lines[-1]), said
    except (IndexError, ValueError):
        return None, said
