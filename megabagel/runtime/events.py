"""What happened to a run, one JSON line each in RUN_DIR/events.jsonl: starts, ends, faults, hangs, restarts.

Any process of any attempt may append; a line is one write, so lines of several writers do not mix. What every step
measured is in metrics.jsonl instead.
"""

import json
import os
import socket
import time
from pathlib import Path

EVENTS_FILE = "events.jsonl"


def record(run_dir: str | Path, kind: str, **details: object) -> None:
    """Append one event. `details`: what JSON can hold, by convention `step` where one is concerned.

    `time` (seconds since 1970), `rank`, `host`, `job` (SLURM's, if any), `requeue` and `restart` (how often SLURM and
    torchrun started it again) are added.
    """
    line = {
        "time": time.time(),
        "kind": kind,
        "rank": int(os.environ.get("RANK", "0")),
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "requeue": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0),
        **details,
    }
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    file = os.open(Path(run_dir) / EVENTS_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(file, (json.dumps(line) + "\n").encode())
    finally:
        os.close(file)


def read(run_dir: str | Path) -> list[dict]:
    """All complete lines in the order in which they were written; none where there is no file."""
    path = Path(run_dir) / EVENTS_FILE
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:  # a writer was killed, or is still writing
            continue
    return events
