"""Whole evaluations with a tiny model: the same scores on one and four processes, and nothing is done twice."""

import json
from pathlib import Path

import yaml

from tests.distributed import forked

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "tests" / "golden" / "public-basic" / "ckpt"
EXAMPLES = ROOT / "examples" / "evaluation"
SMALL = {"height": 16, "width": 16, "num_timesteps": 2, "batch_size": 1}
TASKS = {
    "questions": {"file": "questions.yaml", "scores": ["vqa_accuracy", "bleu"], "max_tokens": 3, "batch_size": 2},
    "pictures": {"file": "pictures.yaml", "scores": ["retrieval", "consistency"], "max_tokens": 3, **SMALL},
    "geneval": {"file": "geneval.jsonl", "format": "geneval", "samples_per_prompt": 2, **SMALL},
    "dpg": {"file": "dpg", "format": "dpg", "samples_per_prompt": 4, **SMALL},
    "mme": {"file": "mme", "format": "mme", "scores": ["mme"], "max_tokens": 3},
    "pope": {"file": "pope.jsonl", "format": "pope", "images_dir": "../data/pictures", "scores": ["pope"]},
}


def write(folder: Path, tasks: dict, **others) -> Path:
    """A settings file; files of tasks are those of the examples."""
    located = {
        name: {key: str(EXAMPLES / value) if key in ("file", "images_dir") else value for key, value in task.items()}
        for name, task in tasks.items()
    }
    (folder / "eval.yaml").write_text(yaml.safe_dump({"tasks": located, **others}))
    return folder / "eval.yaml"


def evaluate(config: Path, out: Path, processes: int) -> str:
    arguments = ["--model", str(CHECKPOINT), "--config", str(config), "--out", str(out)]
    result = forked.run("megabagel.evaluate", *arguments, processes=processes, timeout=500)
    assert result.returncode == 0, result.stdout
    return result.stdout


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_scores_do_not_depend_on_the_number_of_processes_and_nothing_is_done_twice(tmp_path):
    config = write(tmp_path, TASKS)
    alone, together = tmp_path / "1", tmp_path / "4"
    evaluate(config, alone, 1)
    table = evaluate(config, together, 4)
    results = json.loads((alone / "results.json").read_text())
    assert json.loads((together / "results.json").read_text()) == results
    assert {name: task["items"] for name, task in results["tasks"].items()} == {
        "questions": 3, "pictures": 4, "geneval": 4, "dpg": 4, "mme": 4, "pope": 4
    }  # fmt: skip
    assert 0 <= results["tasks"]["pope"]["scores"]["f1"] <= 1 and "| pope | 4 | f1 |" in table
    shared = list((together / "pictures" / "made").glob("rank_*.jsonl"))
    assert len(shared) == 4
    for task in ("geneval", "dpg", "mme", "pope"):  # what other programs read
        assert files(alone / task / "answers") == files(together / task / "answers")
    metadata = [path for path in files(alone / "geneval" / "answers") if path.endswith("metadata.jsonl")]
    assert metadata == ["00000/metadata.jsonl", "00001/metadata.jsonl"]
    assert (alone / "geneval" / "answers" / "00001" / "samples" / "00001.png").is_file()
    assert list(files(alone / "dpg" / "answers")) == ["ball.png"]
    assert len((alone / "mme" / "answers" / "color.txt").read_text().split("\n")[0].split("\t")) == 4
    assert (alone / "questions.png").is_file() and (alone / "pictures.png").is_file()

    # a rank's file is lost, another is cut short; everything else stays as it is
    whole = files(together)
    (together / "pictures" / "made" / "rank_0002.jsonl").unlink()
    cut = together / "pictures" / "retrieval-9" / "rank_0001.jsonl"
    cut.write_bytes(cut.read_bytes()[:-5])
    again = evaluate(config, together, 1)
    assert json.loads((together / "results.json").read_text()) == results
    assert "pictures made: 100%" in again and "questions made" not in again
    after = files(together)
    assert all(after[name] == whole[name] for name in whole if name.endswith("rank_0003.jsonl"))
    assert {k: v for k, v in after.items() if k.endswith(".png")} == {
        k: v for k, v in whole.items() if k.endswith(".png")
    }

    # other requests do not mix with these
    tasks = {"pictures": {**TASKS["pictures"], "num_timesteps": 3}}
    arguments = ["--model", str(CHECKPOINT), "--config", str(write(tmp_path, tasks)), "--out", str(together)]
    refused = forked.run("megabagel.evaluate", *arguments, processes=1, timeout=300)
    assert refused.returncode == 1 and "holds results of other settings; give another --out" in refused.stdout
