"""The lines of RUN_DIR/metrics.jsonl: read, and rid of steps that will be done again. Needs no model."""

import json
import time
from pathlib import Path

from megabagel.runtime import events

METRICS_FILE, CONFIG_FILE = "metrics.jsonl", "config.yaml"


def drop_later_steps(path: Path, last_step: int) -> list[dict]:
    """Remove lines about steps after `last_step`, and a last line that a kill cut short, so each step appears once.
    Returns what the lines said."""
    if not path.exists():
        return []
    kept, dropped = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= last_step:
                kept.append(line + "\n")
            else:
                dropped.append(record)
        except (ValueError, KeyError, TypeError):
            continue
    if last_step == 0 and path.stat().st_size:  # a new run in an old folder: keep what the old one measured
        path.replace(path.with_name(f"metrics.before-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"))
        return dropped
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(kept), encoding="utf-8")
    replacement.replace(path)
    return dropped


def record_repetition(run_dir: Path, dropped: list[dict]) -> None:
    """For the account of lost time: steps that will be done again, what they took, and when the last one ended."""
    steps = [record["step"] for record in dropped]
    seconds = sum(record.get("step_time") or 0.0 for record in dropped)
    last = max(record.get("time", 0.0) for record in dropped)
    details = {"from_step": min(steps), "to_step": max(steps), "seconds": seconds, "last": last}
    events.record(run_dir, "recomputed", **details)


def read_metrics(run_dir: Path) -> list[dict[str, float | None]]:
    """All complete lines of a run's metrics file in order of steps; a line still being written is left out."""
    records = []
    for line in (run_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return sorted(records, key=lambda record: record["step"])
