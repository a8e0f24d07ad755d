"""Makes one HTML page of a run folder: losses by task, throughput, faults, restarts and where the time went.

    python tools/report_run.py runs/demo                       # writes runs/demo/report.html
    python tools/report_run.py runs/demo --out /tmp/demo.html

The page needs no network and no other file. It reads metrics.jsonl, events.jsonl and config.yaml, also of a run that is
going on; effective training time is the time of steps that counted over all time since the first start. The last line
printed is JSON.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

from run_report.account import account  # noqa: E402
from run_report.page import render  # noqa: E402

from megabagel.runtime import events as run_events  # noqa: E402
from megabagel.training.metrics_file import CONFIG_FILE, METRICS_FILE, read_metrics  # noqa: E402


def checkpoints_of(run_dir: Path, page: Path) -> list[dict]:
    """Name, link from the page, and size of every checkpoint."""
    return [
        {
            "name": folder.name,
            "href": quote(os.path.relpath(folder, page.parent)),
            "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        }
        for folder in sorted(run_dir.glob("iter_*"))
        if folder.is_dir()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="folder of a run (checkpoint.run_dir)")
    parser.add_argument("--out", type=Path, help="the page (default: RUN_DIR/report.html)")
    options = parser.parse_args()
    run_dir, page = options.run_dir, options.out or options.run_dir / "report.html"
    events = run_events.read(run_dir)
    try:
        records = read_metrics(run_dir)
    except OSError as error:
        if not events:
            raise SystemExit(
                f"{run_dir} holds no {METRICS_FILE} ({error.strerror}); give the folder of a run."
            ) from None
        records = []  # nothing but starts that failed
    config = run_dir / CONFIG_FILE
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    found = account(records, events)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(run_dir, found, events, text, checkpoints_of(run_dir, page)), encoding="utf-8")
    print(page)
    spent = {cause: round(seconds, 3) for cause, seconds in found.spent.items()}
    print(json.dumps({"effective": found.effective, "wall": found.wall, "starts": len(found.attempts), "spent": spent}))


if __name__ == "__main__":
    main()
