"""What a run that was struck has lost, from its events and its metrics."""

from pathlib import Path
from statistics import median

from megabagel.runtime import events
from megabagel.training.metrics_file import read_metrics


def account(run_dir: Path) -> dict:
    """Effective training time (seconds of the steps that count over all seconds since the first launch), and of each
    strike the seconds until it was noticed and from there until training went on (None: the run survived it)."""
    happened = events.read(run_dir)
    steps = [record["step_time"] for record in read_metrics(run_dir)]
    begin = next(e["time"] for e in happened if e["kind"] == "launch")
    end = [e["time"] for e in happened if e["kind"] == "end"][-1]
    faults = [_fault(happened, e) for e in happened if e["kind"] == "injected"]
    seconds = {
        "total": end - begin,
        "steps_that_count": sum(steps),
        "to_notice": _median([f["to_notice"] for f in faults if f["signal"] == "SIGKILL"]),
        "to_notice_a_stopped_rank": _median([f["to_notice"] for f in faults if f["signal"] == "SIGSTOP"]),
        "to_train_again": _median([f["to_train_again"] for f in faults]),
    }
    return {
        "ratios": {"effective_training_time": sum(steps) / (end - begin)},
        "seconds": seconds,
        "steps": len(steps),
        "skipped_steps": sum(e["kind"] == "nonfinite" for e in happened),
        "launches": sum(e["kind"] == "launch" for e in happened),
        "hangs": [e["message"] for e in happened if e["kind"] == "hang"],
        "faults": faults,
    }


def _fault(happened: list[dict], strike: dict) -> dict:
    noticed = _next(happened, "noticed", strike["time"])
    again = _next(happened, "start", noticed) if noticed else None
    return {
        **{name: strike[name] for name in ("signal", "rank", "step", "phase")},
        "to_notice": noticed and noticed - strike["time"],
        "to_train_again": again and again - noticed,
    }


def _next(happened: list[dict], kind: str, after: float) -> float | None:
    return next((e["time"] for e in happened if e["kind"] == kind and e["time"] >= after), None)


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
