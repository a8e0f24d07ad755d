"""The starts of a run, in its events: how each one ended, and an end to a run that only ever starts.

Used by global rank 0. Whether a run goes on after a failure is its launcher's decision; here is the brake.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from megabagel.checkpoint import folder
from megabagel.runtime import events
from megabagel.runtime.give_up import GiveUp

_ORDERLY = ("done", "data_end", "early_stop", "signal", "time_limit")


def launch(run_dir: str | Path, limit: int | None) -> None:
    """Record this start. Raises GiveUp when more than `limit` starts before it brought no new checkpoint.

    After that a start by hand counts anew, but not one by torchrun or SLURM.
    """
    past = events.read(run_dir)
    events.record(run_dir, "launch", newest=folder.latest_step(run_dir))
    me = events.read(run_dir)[-1]
    last = next((e for e in reversed(past) if e["kind"] in ("launch", "end")), None)
    if last and last.get("reason") == "give_up" and (me["restart"], me["requeue"]) != (0, 0):
        raise GiveUp(f"the start before this one gave up: {last['message']}")
    vain = _attempts_in_vain(past)
    if limit is not None and len(vain) > limit:
        raise GiveUp(_summary(run_dir, vain, limit))


def started(run_dir: str | Path, step: int, **details: object) -> None:
    """Record that training goes on after `step`; `seconds` are those since this process began."""
    events.record(run_dir, "start", step=step, seconds=time.time() - psutil.Process().create_time(), **details)


def ended(run_dir: str | Path, step: int, reason: str, saved: bool) -> None:
    """Record an orderly end after `step`. `saved`: whether the newest checkpoint is of that step."""
    events.record(run_dir, "end", step=step, reason=reason, saved=saved)


def _attempts_in_vain(past: Sequence[dict]) -> list[list[dict]]:
    """The events of each attempt since something was reached: a checkpoint, an orderly end, or that it was given up."""
    attempts: list[list[dict]] = []
    for event in past:
        if event["kind"] == "launch":
            attempts.append([event])
        elif event["kind"] == "save" or (event["kind"] == "end" and event["reason"] in (*_ORDERLY, "give_up")):
            attempts = []
        elif attempts:
            attempts[-1].append(event)
    return attempts


def _summary(run_dir: str | Path, vain: list[list[dict]], limit: int) -> str:
    newest = folder.latest_step(run_dir)
    known = "there is no checkpoint" if newest is None else f"the newest checkpoint is after step {newest}"
    rows = [f"  {_when(attempt[0])}  {_fate(attempt)}" for attempt in vain]
    return "\n".join(
        [
            f"{len(vain)} starts in a row brought no new checkpoint ({known}); this is more than "
            f"faults.max_restarts_without_progress, {limit}, so the run is given up:",
            *rows,
            "remove the cause and start again by hand: starts are counted anew then.",
        ]
    )


def _when(start: dict) -> str:
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start["time"]))
    job = f" job {start['job']}.{start['requeue']}" if start["job"] else ""
    return f"{moment} on {start['host']}{job}"


def _fate(attempt: list[dict]) -> str:
    """What the last thing was that an attempt said."""
    for event in reversed(attempt):
        if event["kind"] == "failure":
            return event["message"].splitlines()[0]
        if event["kind"] == "hang":
            return f"hung in step {event['step']}, see {event['file']}"
    steps = [event["step"] for event in attempt if event["kind"] == "start"]
    where = f"in training after step {steps[-1]} or later" if steps else "before training began"
    return f"ended without a word {where}: killed, or its machine was lost"
