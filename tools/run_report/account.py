"""Where the time of a run went: what its events and the lines of its steps say, over all starts.

Plain lists and numbers; nothing is read or drawn here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

ORDERLY = ("done", "data_end", "early_stop")


@dataclass
class Attempt:
    """One start of the run's processes; times are seconds since 1970."""

    begin: float
    job: str
    host: str
    started: float | None = None  # training went on then, after `first_step`
    first_step: int | None = None
    world_size: int | None = None
    last_step: int | None = None  # that was logged and not repeated later
    last_alive: float = 0.0
    events: list[dict] = field(default_factory=list)

    @property
    def fate(self) -> str:
        """How it ended, in words."""
        kinds = {event["kind"]: event for event in self.events}
        if "hang" in kinds:
            return f"hung in step {kinds['hang'].get('step')}"
        if (end := kinds.get("end")) and end.get("reason") not in ("failed", "give_up"):
            return {"done": "finished", "data_end": "the data ended", "early_stop": "stopped early"}.get(
                end["reason"], f"stopped: {end['reason'].replace('_', ' ')}"
            )
        if "failure" in kinds:
            return kinds["failure"]["message"].splitlines()[0]
        return end["reason"] if end else ""


@dataclass(frozen=True)
class Account:
    """`spent`: cause -> seconds, which add up to `wall`; `productive` is the first."""

    attempts: list[Attempt]
    steps: list[dict]  # metrics of each step that counted, once
    spent: dict[str, float]
    wall: float
    is_over: bool

    @property
    def effective(self) -> float | None:
        """Share of the wall time in steps that counted."""
        return self.spent["training"] / self.wall if self.wall > 0 else None


CAUSES = {
    "training": "steps that counted",
    "saves": "waiting for checkpoints",
    "validation": "held-out losses",
    "start": "starting: processes, model, checkpoint",
    "recomputed": "steps done again after a restart",
    "hang": "noticing hangs",
    "restart": "between a failure and the next start",
    "queue": "between jobs",
    "other": "cut-off steps, first reading of data, logs, samples, ending",
}


def account(records: Sequence[dict], events: Sequence[dict]) -> Account:
    """`records`: lines of metrics.jsonl in any order; `events`: those of events.jsonl, of the same run.

    Without events the first line begins the run.
    """
    steps, repeated = _once(records)
    attempts = _attempts(events, steps)
    if not attempts:
        return Account([], steps, dict.fromkeys(CAUSES, 0.0), 0.0, False)
    spent = dict.fromkeys(CAUSES, 0.0)
    spent["training"] = _sum(steps, "step_time")
    spent["saves"] = _sum(steps, "save_blocked_time")
    spent["validation"] = _sum(steps, "validation/seconds")
    dropped = [event for event in events if event["kind"] == "recomputed"]
    spent["recomputed"] = _sum(repeated, "step_time") + _sum(dropped, "seconds")
    spent["hang"] = _sum([event for event in events if event["kind"] == "hang"], "seconds")
    spent["start"] = sum((a.started or a.last_alive) - a.begin for a in attempts)
    for before, after in zip(attempts, attempts[1:], strict=False):
        gap = max(0.0, after.begin - before.last_alive)
        spent["restart" if (before.job == after.job and not _ended_well(before)) else "queue"] += gap
    wall = attempts[-1].last_alive - attempts[0].begin
    spent["other"] = max(0.0, wall - sum(spent.values()))
    return Account(attempts, steps, spent, wall, _ended_well(attempts[-1]))


def _once(records: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """The newest line of every step in order, and the older ones."""
    newest: dict[int, dict] = {}
    older = []
    for record in sorted(records, key=lambda record: record.get("time", 0.0)):
        if record["step"] in newest:
            older.append(newest[record["step"]])
        newest[record["step"]] = record
    return [newest[step] for step in sorted(newest)], older


def _attempts(events: Sequence[dict], steps: Sequence[dict]) -> list[Attempt]:
    attempts: list[Attempt] = []
    for event in sorted(events, key=lambda event: event["time"]):
        kind = event["kind"]
        if kind == "launch" or (kind == "start" and (not attempts or attempts[-1].started is not None)):
            job = f"{event.get('job', '')}.{event.get('requeue', 0)}" if event.get("job") else ""
            attempts.append(Attempt(event["time"], job, event.get("host", "")))
        if not attempts or kind == "requeue" or kind == "preflight":
            continue
        mine = attempts[-1]
        mine.events.append(event)
        if kind != "noticed":  # by the launcher, when the processes were gone
            mine.last_alive = max(mine.last_alive, event["time"])
        if kind == "start":
            mine.started, mine.first_step = event["time"], event.get("step")
            mine.world_size = event.get("world_size")
            # the processes began before the first of them could write anything
            earliest = attempts[-2].last_alive if len(attempts) > 1 else 0.0
            mine.begin = max(earliest, min(mine.begin, event["time"] - event.get("seconds", 0.0)))
        if kind == "recomputed" and len(attempts) > 1:  # what the attempt before had done since its last event
            attempts[-2].last_alive = min(max(attempts[-2].last_alive, event.get("last") or 0.0), mine.begin)
    if not attempts and steps:
        attempts = [Attempt(steps[0]["time"] - (steps[0].get("step_time") or 0.0), "", "")]
        attempts[0].started, attempts[0].first_step = attempts[0].begin, steps[0]["step"] - 1
    for record in steps:
        mine = next((a for a in reversed(attempts) if a.begin <= record["time"]), None)
        if mine is not None:
            mine.last_step = record["step"]
            mine.last_alive = max(mine.last_alive, record["time"])
    return attempts


def _ended_well(attempt: Attempt) -> bool:
    ends = [event for event in attempt.events if event["kind"] == "end"]
    return bool(ends) and ends[-1].get("reason") in ORDERLY


def _sum(records: Sequence[dict], name: str) -> float:
    return float(sum(record.get(name) or 0.0 for record in records))
