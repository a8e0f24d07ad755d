"""All formats train together as a user starts it; bad rows among them are skipped and listed, those and no others."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml
from PIL import Image

from megabagel.config.datasets import FORMATS, UND_ONLY
from megabagel.data.faults import FAULTS_FILE
from megabagel.training.metrics_file import read_metrics
from tests.distributed.launch import ROOT, launch_ok
from tests.tiny_data import training_options

BUDGETS = ["--data.expected_num_tokens=2000", "--data.max_num_tokens=2400", "--data.max_num_tokens_per_sample=400"]
PLANTED = {  # format -> rows and the kinds of their faults
    "conversations": [
        ({"messages": []}, "bad_row"),
        ({"messages": [{"role": "assistant", "type": "image", "image_path": "../data.yaml"}]}, "path_outside"),
    ],
    "text_to_image": [({"text_prompt": "A cat.", "image_path": "gone.png"}, "missing_file")],
    "image_to_text": [
        ({"text": "Cut short.", "image_path": "cut.png"}, "undecodable_image"),  # its header is whole
        ({"text": "No picture.", "image_path": "words.png"}, "undecodable_image"),
    ],
    "multi_step_editing": [({"input_image": "red_circle.png", "editing_steps": [{"instruction": 5}]}, "bad_row")],
    "sequence": [({"sequence": [{"type": "text", "content": "round " * 500, "loss": True}]}, "over_long")],
    "interleaved": [({"content": [{"type": "sound", "content": "red_circle.png"}]}, "bad_row")],
    "pretrain_pair": [({"text": "Large.", "image": "large.png", "metadata": {}}, "image_bomb")],
    "sft_chat": [({"image": "tall.png", "conversations": []}, "bad_row")],
    "text": [("{broken", "broken_json"), ({"text": None}, "bad_row")],
}


@pytest.fixture
def data(tmp_path) -> Path:
    """A copy of the examples."""
    shutil.copytree(ROOT / "examples" / "data", tmp_path / "data")
    return tmp_path / "data"


def with_groups(data: Path, **fields) -> dict:
    """The groups of data.yaml, after these fields were set in each."""
    file = data / "data.yaml"
    groups = yaml.safe_load(file.read_text())
    for group in groups.values():
        group |= fields
    file.write_text(yaml.safe_dump(groups, sort_keys=False))
    return groups


def train(data: Path, run_dir: Path, steps: int, *extra: str) -> tuple[list[dict], str]:
    """Metrics of a run in one process, and what it printed."""
    options = [*training_options(data / "data.yaml", run_dir, steps), *BUDGETS, *extra]
    printed = launch_ok("megabagel.train", *options, processes=1, timeout=180)
    return read_metrics(run_dir), printed


def test_all_formats_train_together(data, tmp_path):
    groups = with_groups(data, is_mandatory=True)  # every group in every pack
    assert set(groups) == set(FORMATS)
    metrics, printed = train(data, tmp_path / "run", 3)
    assert [step["step"] for step in metrics] == [1, 2, 3]
    for step in metrics:
        assert all(math.isfinite(step[name]) for name in ("ce", "mse", "grad_norm"))
        assert step["skipped_samples"] == 0 and not any(name.startswith("data/faults/") for name in step)
        assert all(step[f"data/samples/{name}"] >= 2 * step["step"] for name in groups)  # two packs a step
    assert "bad rows" not in printed and not (tmp_path / "run" / FAULTS_FILE).exists()


def test_bad_rows_are_listed_and_the_run_ends_with_its_data(data, tmp_path):
    groups = with_groups(data, repeats=2)
    assert set(PLANTED) <= set(groups) and any(name not in UND_ONLY for name in PLANTED)
    planted = plant(data, groups)
    metrics, printed = train(data, tmp_path / "run", 1000, "--data.max_image_pixels=10000")

    lines = [json.loads(line) for line in (tmp_path / "run" / FAULTS_FILE).read_text().splitlines()]
    assert Counter((line["group"], line["kind"], line["origin"].rpartition(" ")[2]) for line in lines) == planted
    assert all(Path(line["origin"].split()[0]).is_relative_to(data / line["group"]) for line in lines)
    assert "the data end after step" in printed and f"{2 * len(lines)} bad rows" in printed
    last = metrics[-1]
    kinds = Counter(kind for _, kind, _ in planted.elements())
    assert last["skipped_samples"] == 2 * len(lines)  # both passes met them
    assert {name: last[f"data/faults/{name}"] for name in kinds} == {name: 2 * n for name, n in kinds.items()}
    assert last["data/faults/text/broken_json"] == 2 and last["data/samples/text"] == 4
    assert all(math.isfinite(step["grad_norm"]) for step in metrics)


def plant(data: Path, groups: dict) -> Counter:
    """Append the bad rows to their files: (group, kind, number of the row in messages)."""
    pictures, planted = data / "pictures", Counter()
    whole = (pictures / "tall.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "words.png").write_text("no picture")
    Image.new("RGB", (150, 100)).save(pictures / "large.png")
    for name, rows in PLANTED.items():
        path = data / groups[name]["datasets"]["tiny"]["path"]
        path = next(path.iterdir()) if path.is_dir() else path
        for row, kind in rows:
            planted[name, kind, str(append(path, row))] += 1
    return planted


def append(path: Path, row: dict | str) -> int:
    """Add a row, a string as it is; its number in messages: lines count from 1, elements of a JSON file from 0."""
    if path.suffix == ".jsonl":
        lines = [*path.read_text().splitlines(), row if isinstance(row, str) else json.dumps(row)]
        path.write_text("\n".join(lines) + "\n")
        return len(lines)
    content = json.loads(path.read_text())
    rows = content["data"] if isinstance(content, dict) else content
    rows.append(row)
    path.write_text(json.dumps(content))
    return len(rows) - 1
