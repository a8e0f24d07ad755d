"""A run's events survive kills of their writers and keep one line each."""

import json
import multiprocessing

from megabagel.runtime import events


def _write(run_dir, number):
    for step in range(50):
        events.record(run_dir, "fault", step=step, writer=number, reason="x" * 500)


def test_lines_of_several_processes_do_not_mix(tmp_path):
    writers = [multiprocessing.Process(target=_write, args=(tmp_path / "run", number)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    seen = {(event["writer"], event["step"]) for event in events.read(tmp_path / "run")}
    assert len(seen) == 150 == len((tmp_path / "run" / events.EVENTS_FILE).read_text().splitlines())


def test_a_line_cut_short_is_left_out(tmp_path):
    assert events.read(tmp_path) == []
    events.record(tmp_path, "start", step=0)
    with (tmp_path / events.EVENTS_FILE).open("a") as file:
        file.write(json.dumps({"kind": "end"})[:-3])
    (event,) = events.read(tmp_path)
    assert event["kind"] == "start" and event["rank"] == 0 and event["restart"] == 0 and event["time"] > 1.7e9
