"""Says how an attempt of a run ended and whether SLURM shall start its job again. Nothing is started here.

    python examples/lib/verdict.py RUN_DIR --since SECONDS --asked USR1 --can-requeue true --limit 3

The exit code is the attempt's, see megabagel/runtime/exit_codes.py, or 100 where the job shall start again. What
happened is read from the run folder's events; the decision to start again is recorded there.
"""

import argparse
from pathlib import Path

from megabagel.runtime import events
from megabagel.runtime.exit_codes import DONE, GIVE_UP, STOPPED
from megabagel.runtime.outcome import outcome

START_AGAIN = 100
FAILURE = "failed"  # the reason of a requeue that counts against the limit


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--code", default="", help="exit code of the attempt, where its events do not tell")
    parser.add_argument("--since", type=float, default=0.0, help="start of the attempt in seconds since 1970")
    parser.add_argument("--asked", default="", help="the signal that asked this attempt to stop, if any")
    parser.add_argument("--can-requeue", choices=("true", "false"), default="false")
    parser.add_argument("--limit", type=int, default=3, help="failures in a row without a new checkpoint")
    parser.add_argument("--logs", default="", help="folder of what each rank printed")
    options = parser.parse_args(arguments)
    code = int(options.code) if options.code else outcome(options.run_dir, options.since)
    if code == DONE:
        return DONE
    happened = events.read(options.run_dir)
    step = newest_step(options.run_dir)
    reason, sentence = decide(code, options.asked, options.can_requeue == "true", happened, step, options.limit)
    messages = [event["message"] for event in happened if event["time"] >= options.since and event.get("message")]
    if code != STOPPED and messages:
        print(f"error: {messages[-1]}")
    if code != STOPPED and options.logs:
        print(f"What each rank printed is in {options.logs}.")
    print(sentence, flush=True)
    if reason is None:
        return code
    events.record(options.run_dir, "requeue", step=step, reason=reason)
    return START_AGAIN


def newest_step(run_dir: Path) -> int:
    """Of the newest checkpoint; 0 where there is none."""
    latest = run_dir / "latest_checkpointed_iteration.txt"
    return int(latest.read_text()) if latest.is_file() else 0


def decide(
    code: int, asked: str, can_requeue: bool, happened: list[dict], step: int, limit: int
) -> tuple[str | None, str]:
    """The reason to start again, None for not at all, and a sentence about it.

    `happened`: events of the run so far; `step`: that of its newest checkpoint.
    """
    if code == GIVE_UP:
        return None, "Starting again would end the same way: the run is left as it is."
    if asked not in ("", "USR1"):  # by a person
        return None, f"The run was asked to end; the same command continues it after step {step}."
    if code == STOPPED or asked:
        if can_requeue:
            return "stopped", f"The run stopped after step {step}; the job starts again."
        return None, f"The run stopped after step {step}; the same command continues it."
    if not can_requeue:
        return None, f"The run failed; the same command continues it after step {step}."
    failures = _failures_at(step, happened)
    if failures >= limit:
        return None, f"The run failed {failures + 1} times in a row without a checkpoint beyond step {step}: it ends."
    return FAILURE, f"The run failed; the job starts again after step {step}."


def _failures_at(step: int, happened: list[dict]) -> int:
    """How often in a row the run was started again because it failed with its newest checkpoint after `step`."""
    count = 0
    for event in reversed([event for event in happened if event["kind"] == "requeue"]):
        if event["step"] != step:
            break
        count += event["reason"] == FAILURE
    return count


if __name__ == "__main__":
    raise SystemExit(main())
