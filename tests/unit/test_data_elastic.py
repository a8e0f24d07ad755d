"""Killed at any point and resumed on any layout, a run trains every row of its data exactly as often as it should."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from megabagel.data.faults import FAULTS_FILE
from tests.unit.data_fixtures import png, t2i_rows, vlm_line, write_parquet
from tests.unit.elastic_program import steps_of
from tests.unit.reader_fixtures import GLOBAL_BATCH

ROOT = Path(__file__).parents[2]
SIZES = {"image_stride": 16, "max_image_size": 32, "min_image_size": 16}
VIT_SIZES = {"image_stride": 14, "max_image_size": 28, "min_image_size": 14}
ROWS = {"t2i_pretrain": 100, "vlm_sft": 250, "text": 700}
REPEATS = {"t2i_pretrain": 2, "vlm_sft": 1, "text": 1}
NO_PICTURE, CUT_PICTURE = 7, 11  # found when the row is measured, and only when its pixels are read
BROKEN_LINES = (3, 140)
KILLS, WITH_A_WORKER = 20, (6, 13)


def write_all(folder: Path) -> None:
    """Three groups with a few bad rows, and data.yaml."""
    rows = t2i_rows(range(ROWS["t2i_pretrain"]))
    rows[NO_PICTURE]["image"] = b"no picture"
    rows[CUT_PICTURE]["image"] = png(5, (32, 32))[:50]
    write_parquet(folder / "t2i" / "0.parquet", rows, rows_per_group=16)
    for n in range(3):
        (folder / f"{n}.png").write_bytes(png(n, (28, 30)))
    lines = [json.dumps(vlm_line(n)) for n in range(ROWS["vlm_sft"])]
    for n in BROKEN_LINES:
        lines[n] = "{broken"
    (folder / "vlm.jsonl").write_text("\n".join(lines) + "\n")
    texts = [json.dumps({"text": f"a red cat {n} " * (1 + n % 9)}) for n in range(ROWS["text"])]
    (folder / "text.jsonl").write_text("\n".join(texts) + "\n")
    content = {
        "t2i_pretrain": {"datasets": {"a": {"path": "t2i"}}, "image_transform_args": SIZES, "is_mandatory": True},
        "vlm_sft": {"datasets": {"a": {"jsonl_path": "vlm.jsonl", "data_dir": "."}}, "image_transform_args": VIT_SIZES},
        "text": {"datasets": {"a": {"path": "text.jsonl"}}, "image_transform_args": VIT_SIZES, "weight": 2.0},
    }
    for name, group in content.items():
        group["repeats"] = REPEATS[name]
    (folder / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def wanted_keys() -> Counter:
    """(group, row, visit) of all that must be trained."""
    bad = {("t2i_pretrain", NO_PICTURE), ("t2i_pretrain", CUT_PICTURE), *(("vlm_sft", n) for n in BROKEN_LINES)}
    return Counter(
        (index, row, visit)
        for index, (name, rows) in enumerate(ROWS.items())
        for row in range(rows)
        for visit in range(REPEATS[name])
        if (name, row) not in bad
    )


class Program:
    """The reading program of `elastic_program.py`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.elastic_program"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def train(self, folder: Path, size: int, workers: int, steps: int | None = None, then: float = 0) -> int:
        """Exit code of a run in `folder`, or minus the signal that ended it: it is killed `then` seconds after so many
        `steps`."""
        folder.mkdir(exist_ok=True)
        request = {"folder": str(folder), "size": size, "workers": workers, "steps": steps, "then": then}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=30)


@pytest.fixture(scope="module")
def program():
    program = Program()
    yield program
    program.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    write_all(folder)
    return folder


@pytest.fixture(scope="module")
def whole(program, data) -> list[dict]:
    """The steps of a run that nobody killed."""
    assert program.train(data / "whole", size=1, workers=0) == 0
    return trained(data / "whole")


def trained(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in steps_of(folder)]


def keys_of(steps: list[dict]) -> Counter:
    """What was trained, without the blank texts that fill up the last step."""
    return Counter(tuple(key) for step in steps for key in step["keys"] if key[0] >= 0)


def test_an_epoch_is_every_good_row_as_often_as_it_repeats(whole):
    assert keys_of(whole) == wanted_keys()
    assert all(len(step["packs"]) == GLOBAL_BATCH for step in whole)


def test_accepted_and_skipped_rows_are_all_rows_drawn(whole, data):
    end = json.loads((data / "whole" / "end.json").read_text())
    for state in [*(step["state"] for step in whole), end]:
        log = state["faults"]
        for name, drawn in zip(ROWS, state["counts"], strict=True):
            assert log["num_good"].get(name, 0) + sum(log["num_bad"][name].values()) == drawn
    assert dict(zip(ROWS, end["counts"], strict=True)) == {name: ROWS[name] * REPEATS[name] for name in ROWS}
    assert log["num_bad"] == {"t2i_pretrain": {"undecodable_image": 4}, "vlm_sft": {"broken_json": 2}, "text": {}}
    lines = [json.loads(line) for line in (data / "whole" / FAULTS_FILE).read_text().splitlines()]
    assert sorted((line["group"], line["kind"], line["origin"].rpartition("/")[2]) for line in lines) == [
        ("t2i_pretrain", "undecodable_image", f"0.parquet row {CUT_PICTURE}"),
        ("t2i_pretrain", "undecodable_image", f"0.parquet row {NO_PICTURE}"),
        *(("vlm_sft", "broken_json", f"vlm.jsonl line {n + 1}") for n in sorted(BROKEN_LINES, reverse=True)),
    ]


def test_any_layout_and_any_kill_train_the_same_packs(program, data, whole):
    """Twenty kills -9 at random points, each time resumed with another number of replicas and workers."""
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    folder, runs = data / "killed", []
    for kill in range(KILLS):
        left = len(whole) - len(steps_of(folder)) - 3
        steps = draw.choice([0, 1, 1, 2]) if left > 2 else 0
        then = draw.uniform(0, 0.03 if steps or left <= 2 else 0.2)  # a step takes longer, a start too
        runs.append((draw.choice([1, 2, 3, 4]), int(kill in WITH_A_WORKER), steps, then))
        code = program.train(folder, *runs[-1])
        assert code == -9, f"seed {seed}, {runs}: ended with {code} before it was killed"
    assert program.train(folder, draw.choice([2, 3]), workers=2) == 0, f"seed {seed}, {runs}"
    steps = trained(folder)
    assert keys_of(steps) == wanted_keys(), f"seed {seed}, {runs}"
    for ours, theirs in zip(steps, whole, strict=True):
        assert sorted(ours["packs"]) == sorted(theirs["packs"]), f"seed {seed}, {runs}"
        assert ours["state"] == theirs["state"], f"seed {seed}, {runs}"
    assert (folder / FAULTS_FILE).read_text().count("\n") == 4
