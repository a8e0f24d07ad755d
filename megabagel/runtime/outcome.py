"""How a run ended, as an exit code: torchrun hides the codes of its workers, a launcher asks here.

    python -m megabagel.runtime.outcome RUN_DIR [--since SECONDS]; echo $?

prints nothing; the codes are those of `exit_codes.py`.
"""

import argparse
import sys
from pathlib import Path

from megabagel.runtime import events
from megabagel.runtime.exit_codes import DONE, FAILED, GIVE_UP, STOPPED

CODES = {
    "done": DONE,
    "data_end": DONE,
    "early_stop": DONE,
    "signal": STOPPED,
    "time_limit": STOPPED,
    "failed": FAILED,
    "give_up": GIVE_UP,
}


def outcome(run_dir: str | Path, since: float = 0.0) -> int:
    """Exit code of the last attempt. An attempt that did not get to say how it ended has FAILED, and so has one that
    was stopped without a checkpoint of what it had done. `since`: seconds since 1970; what happened before is left out.
    """
    last = [e for e in events.read(run_dir) if e["kind"] in ("launch", "end") and e["time"] >= since][-1:]
    if not last or last[0]["kind"] != "end":
        return FAILED
    code = CODES.get(last[0]["reason"], FAILED)
    return FAILED if code == STOPPED and not last[0]["saved"] else code


def main(argv: list[str] | None = None) -> int:
    """For launchers."""
    parser = argparse.ArgumentParser(prog="python -m megabagel.runtime.outcome", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--since", type=float, default=0.0, help="seconds since 1970; earlier attempts do not count")
    arguments = parser.parse_args(argv)
    return outcome(arguments.run_dir, arguments.since)


if __name__ == "__main__":
    sys.exit(main())
