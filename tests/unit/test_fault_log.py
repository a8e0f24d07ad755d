"""Bad rows are counted, listed once in a file, said a few times, and too many of them end the run."""

import json
import random
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from megabagel.data import faults
from megabagel.data.faults import DataError, Fault, FaultLog, log_values


def fault(row: int, kind: str = "bad_row") -> Fault:
    return Fault(kind, f"a.jsonl line {row}", f"wrong {row}", (0, row, 0))


def listed(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_each_bad_row_is_listed_once_and_runs_append(tmp_path):
    file = tmp_path / "run" / "data_faults.jsonl"
    for _ in range(2):  # the second run goes over the same rows
        log = FaultLog({"g": 10, "h": 10}, 1.0, file)
        log.file_fault("h", Fault("missing_file", "b.parquet", "is not there"))
        for visit in range(2):
            for row in range(3):
                log.bad("g", Fault("bad_row", f"a.jsonl line {row}", f"visit {visit}", (0, row, visit)))
    log.bad("g", fault(1, "over_long"))
    log.bad("h", fault(1))
    lines = listed(file)
    assert [(line["group"], line["kind"], line["origin"]) for line in lines] == [
        ("h", "missing_file", "b.parquet"),
        *(("g", "bad_row", f"a.jsonl line {row}") for row in range(3)),
        ("g", "over_long", "a.jsonl line 1"),
        ("h", "bad_row", "a.jsonl line 1"),
    ]
    assert lines[1]["message"] == "visit 0" and lines[1]["key"] == [0, 0, 0] and "key" not in lines[0]
    assert datetime.fromisoformat(lines[0]["time"]).utcoffset() == timedelta(0)


def test_a_list_that_a_kill_cut_short_is_continued(tmp_path):
    file = tmp_path / "data_faults.jsonl"
    FaultLog({"g": 9}, 1.0, file).bad("g", fault(1))
    with file.open("ab") as lines:
        lines.write(b'a note of the user\n{"time": "2026')
    log = FaultLog({"g": 9}, 1.0, file)
    for row in (1, 2):
        log.bad("g", fault(row))
    first, note, last = file.read_text().splitlines()
    assert (json.loads(first)["origin"], note) == ("a.jsonl line 1", "a note of the user")
    assert json.loads(last)["origin"] == "a.jsonl line 2"


def test_names_that_are_not_unicode_are_listed_too(tmp_path, caplog):
    file = tmp_path / "data_faults.jsonl"
    for _ in range(2):
        FaultLog({"g": 9}, 1.0, file).bad("g", Fault("bad_row", "caf\udce9.jsonl line 1", "é \ud800\n\x00"))
    (line,) = listed(file)
    assert (line["origin"], line["message"]) == ("caf\udce9.jsonl line 1", "é \ud800\n\x00")
    assert "caf\\udce9.jsonl line 1: é \\ud800" in caplog.text


def test_the_memory_of_listed_rows_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "LISTED_ROWS_KNOWN", 3)
    log = FaultLog({"g": 99}, 1.0, tmp_path / "f")
    for row in (0, 1, 2, 2, 3, 0):  # 0 is forgotten when 3 comes
        log.bad("g", fault(row))
    assert [line["origin"][-1] for line in listed(tmp_path / "f")] == ["0", "1", "2", "3", "0"]


def test_the_log_says_a_few_of_each_kind_then_every_tenfold(caplog):
    log = FaultLog({"g": 10_000, "h": 10_000})
    for row in range(1000):
        log.good("g")
        log.bad("g", fault(row))
        if row < 2:
            log.bad("h", fault(row, "over_long"))
    lines = said(caplog)
    assert len(lines) == 5 + 2 + 3
    assert lines[0] == "g: skipped a.jsonl line 0: wrong 0 [bad_row]"
    assert lines[-1] == (
        "g: 1000 times bad_row so far, 1000 of 2000 rows are bad; the last: a.jsonl line 999: wrong 999 [bad_row]"
    )
    assert "g: 10 times bad_row so far" in lines[-3] and "g: 100 times" in lines[-2]


def test_only_the_replica_that_speaks_logs(caplog):
    FaultLog({"g": 9}, say=False).bad("g", fault(1))
    assert not caplog.records


def test_too_many_bad_rows_end_the_run_with_what_is_wrong(tmp_path):
    log = FaultLog({"g": 1000, "h": 1000}, 0.05, tmp_path / "list")
    for _ in range(500):
        log.good("h")
    for row in range(4):
        log.bad("g", fault(row, "bad_row" if row else "over_long"))  # 4 of 4 rows, but too few to judge
    for _ in range(95):
        log.good("g")
    log.bad("g", fault(99))  # 5 of 100 are allowed
    with pytest.raises(DataError) as error:
        log.bad("g", fault(100, "missing_file"))
    assert str(error.value) == (
        "group g: 6 of 101 rows (5.9%) cannot be used (bad_row 4, over_long 1, missing_file 1), more than "
        "data.max_bad_fraction = 0.05 allows; for example a.jsonl line 100: wrong 100 [missing_file]; "
        "a.jsonl line 0: wrong 0 [over_long]; a.jsonl line 1: wrong 1 [bad_row]. All are listed in "
        f"{tmp_path / 'list'}: fix the data or raise data.max_bad_fraction."
    )
    assert len(listed(tmp_path / "list")) == 6


def test_a_late_fault_is_no_good_row(caplog):
    log = FaultLog({"g": 300}, 0.05)
    for _ in range(200):
        log.good("g")
    for row in range(10):
        log.late("g", fault(row, "undecodable_image"))
    assert log.num_good["g"] == 190 and log.counts() == {"g": {"undecodable_image": 10}}
    with pytest.raises(DataError, match=r"11 of 200 rows \(5.5%\)"):
        log.late("g", fault(10, "undecodable_image"))


def test_late_faults_end_the_run_only_when_no_row_was_good():
    log = FaultLog({"g": 5})
    for _ in range(12):
        log.good("g")
    for _ in range(11):  # one row of a small group, met again and again
        log.late("g", fault(1, "undecodable_image"))
    with pytest.raises(DataError, match="group g: not one of 12 rows of a full pass can be used; the last: a.jsonl"):
        log.late("g", fault(2, "undecodable_image"))


def test_counts_continue_and_files_are_counted_anew():
    state = None
    for _ in range(3):
        log = FaultLog({"g": 40, "h": 4})
        log.file_fault("g", Fault("unreadable_parquet", "b.parquet", "is empty"))
        if state:
            log.load_state_dict(json.loads(json.dumps(state)))
        log.good("h")
        log.bad("h", fault(3, "over_long"))
        log.bad("g", fault(3))
        state = log.state_dict()
    assert log.counts() == {"g": {"bad_row": 3, "unreadable_parquet": 1}, "h": {"over_long": 3}}
    assert log_values(state) == {
        "skipped_samples": 6,
        "data/samples/h": 3,
        "data/faults/g/bad_row": 3,
        "data/faults/g/unreadable_parquet": 1,
        "data/faults/h/over_long": 3,
        "data/faults/bad_row": 3,
        "data/faults/unreadable_parquet": 1,
        "data/faults/over_long": 3,
    }


def test_a_pass_of_bad_rows_is_counted_over_a_resume():
    log = FaultLog({"g": 5})
    log.good("g")
    for row in range(4):
        log.bad("g", fault(row))
    resumed = FaultLog({"g": 5})
    resumed.load_state_dict(log.state_dict())
    with pytest.raises(DataError, match="group g: not one of 5 rows of a full pass can be used; the last: a.jsonl"):
        resumed.bad("g", fault(4))
    log.good("g")
    log.bad("g", fault(4))  # a good row between them: the count begins again


@pytest.mark.parametrize("seed", range(8))
def test_accepted_and_skipped_rows_are_all_rows_drawn(seed, tmp_path):
    """Any order of reports, with a resume now and then from an older state, as after a crash."""
    draw = random.Random(seed)
    rows = {"g": 50, "h": 7}
    log, drawn = FaultLog(rows, 1.0, tmp_path / "list"), Counter()
    saved = (log.state_dict(), drawn.copy())
    reported = set()
    for _ in range(250):
        group, action = draw.choice("gh"), draw.choice(["good", "good", "bad", "late", "save", "crash"])
        bad = fault(draw.randrange(rows[group]), draw.choice(["bad_row", "over_long", "missing_file"]))
        if action == "good" or log.bad_in_a_row[group] == rows[group] - 1 or not log.num_good[group]:
            log.good(group)
            drawn[group] += 1
        elif action == "bad" or (action == "late" and log.num_good[group] > 1):
            getattr(log, action)(group, bad)
            drawn[group] += action == "bad"
            reported.add((group, bad.kind, bad.origin))
        elif action == "save":
            saved = (json.loads(json.dumps(log.state_dict())), drawn.copy())
        elif action == "crash":
            log, drawn = FaultLog(rows, 1.0, tmp_path / "list"), saved[1].copy()
            log.load_state_dict(saved[0])
        skipped = {name: sum(kinds.values()) for name, kinds in log.counts().items()}
        assert all(log.num_good[name] + skipped[name] == drawn[name] for name in rows)
    lines = [(line["group"], line["kind"], line["origin"]) for line in listed(tmp_path / "list")]
    assert len(lines) == len(set(lines)) and set(lines) == reported
