"""The report of a run adds up where its time went, over kills, hangs and restarts, and shows every fault."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tools")]

from run_report.account import account  # noqa: E402
from run_report.curves import MOST_POINTS, draw, smoothed, thinned  # noqa: E402


def event(time: float, kind: str, **details) -> dict:
    return {"time": time, "kind": kind, "rank": 0, "host": "n1", "job": "", "requeue": 0, "restart": 0, **details}


def line(step: int, time: float, **values) -> dict:
    return {"step": step, "time": time, "step_time": 1.0, "ce": 1.0 / step, "tokens_per_sec": 10.0, **values}


# killed in step 5 after a checkpoint of step 2, hung in step 7, then finished
EVENTS = [
    event(1002, "launch", newest=None),
    event(1010, "start", step=0, seconds=10.0, world_size=4),
    event(1013, "save", step=2, seconds=0.5, blocked=0.5),
    event(1031, "launch", newest=2),
    event(1035, "start", step=2, seconds=5.0, world_size=4),
    event(1035, "recomputed", from_step=3, to_step=4, seconds=2.0, last=1016.0),
    event(1037, "nonfinite", step=4, what="loss", samples=[{"group": "t2i", "key": [1], "origin": "a.parquet row 3"}]),
    event(1061, "hang", step=7, seconds=20.0, file="hangs/1", message="rank 2 lags"),
    event(1062, "failure", message="rank 1: no rank has done a step for 20 s"),
    event(1062, "end", step=None, reason="failed"),
    event(1065, "launch", newest=6),
    event(1069, "start", step=6, seconds=6.0, world_size=4),
    event(1073, "end", step=8, reason="done", saved=True),
]
LINES = [
    line(1, 1011),
    line(2, 1012.5, save_blocked_time=0.5),
    line(3, 1036),
    line(4, 1037),
    line(5, 1038),
    line(6, 1039),
    line(7, 1070),
    line(8, 1071),
]


def test_the_time_is_told_apart_by_its_causes():
    found = account(LINES, EVENTS)
    assert [a.begin for a in found.attempts] == [1000, 1030, 1063]
    assert found.wall == 73 and found.is_over
    assert found.spent["training"] == 8 and found.effective == 8 / 73
    assert found.spent["saves"] == 0.5 and found.spent["recomputed"] == 2
    assert found.spent["start"] == 10 + 5 + 6
    assert found.spent["hang"] == 20
    # killed after the step that ended at 1016; the hang was told at 1062
    assert found.spent["restart"] == (1030 - 1016) + (1063 - 1062) and found.spent["queue"] == 0
    assert sum(found.spent.values()) == pytest.approx(found.wall)
    assert [a.last_step for a in found.attempts] == [2, 6, 8]
    assert [a.fate for a in found.attempts] == ["", "hung in step 7", "finished"]


def test_steps_written_twice_count_once():
    lines = [line(1, 11), line(2, 12), line(3, 13), line(2, 14), line(3, 15)]  # a rollback within one start
    found = account(lines, [event(10, "launch"), event(10, "start", step=0, seconds=0.0)])
    assert found.spent["training"] == 3 and found.spent["recomputed"] == 2 and found.wall == 5
    assert not found.is_over


def test_time_in_the_queue_is_not_time_of_a_restart():
    happened = [
        event(10, "launch", job="7"),
        event(10, "start", step=0, seconds=0.0, job="7"),
        event(13, "end", step=2, reason="signal", job="7"),
        event(100, "launch", job="7", requeue=1),
        event(100, "start", step=2, seconds=0.0, job="7", requeue=1),
    ]
    found = account([line(1, 11), line(2, 12), line(3, 101)], happened)
    assert found.spent["queue"] == 87 and found.spent["restart"] == 0


def test_a_run_without_events_or_without_steps_is_told_too():
    found = account([line(1, 11), line(2, 12)], [])
    assert found.wall == 2 and found.effective == 1
    assert account([], []).effective is None
    assert account([], [event(1, "launch"), event(4, "failure", message="no data")]).spent["start"] == 3


def test_the_page_is_whole_and_names_what_happened(tmp_path):
    run = tmp_path / "run <1>"
    (run / "iter_0000002").mkdir(parents=True)
    (run / "iter_0000002" / "a.bin").write_bytes(bytes(2**20))
    (run / "config.yaml").write_text("lr: 1 # <script>")
    for name, records in (("metrics.jsonl", LINES), ("events.jsonl", EVENTS)):
        (run / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    command = [
        sys.executable,
        str(ROOT / "tools/report_run.py"),
        str(run),
        "--out",
        str(tmp_path / "out" / "page.html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "", "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["effective"] == 8 / 73
    page = (tmp_path / "out" / "page.html").read_text()
    for text in (
        "11.0%",
        "a.parquet row 3",
        "hung in step 7",
        "rank 2 lags",
        "../run%20%3C1%3E/iter_0000002",
        "1.0 MiB",
    ):
        assert text in page, text
    assert "run &lt;1&gt;" in page and "<script" not in page
    outside = [u for u in re.findall(r"""(?:src|href|url\()=?["']?([^"' )>]+)""", page) if re.match("(https?:)?//", u)]
    assert not outside
    assert "var(--c1)" in page and "#0000" not in page
    absent = subprocess.run([*command[:2], str(tmp_path / "no")], capture_output=True, text=True, env={"PATH": ""})
    assert absent.returncode == 1 and "holds no metrics.jsonl" in absent.stderr and "Traceback" not in absent.stderr


def test_long_curves_are_thinned_and_short_ones_are_not():
    points = [(float(i), 1.0) for i in range(10 * MOST_POINTS)]
    assert len(thinned(points)) == MOST_POINTS and thinned(points[:5]) == points[:5]
    assert smoothed([(0, 1.0), (1, 2.0), (2, 6.0)])[1] == (1, 3.0)
    assert draw({"one": points, "none": []}).count("<path") > 2
