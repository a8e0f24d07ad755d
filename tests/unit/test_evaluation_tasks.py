"""What is evaluated: files of tasks are read, and what cannot be done is one sentence before anything is loaded."""

from pathlib import Path

import pytest
import yaml

from megabagel.config.errors import ConfigError
from megabagel.evaluation.run import read_tasks
from megabagel.evaluation.settings import read_settings

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "evaluation"


def write(folder: Path, task: dict, **others) -> Path:
    """A settings file with one task on a file of the examples."""
    task = {"file": "questions.yaml", **task}
    content = {"tasks": {"t": {**task, "file": str(EXAMPLES / task["file"])}}, **others}
    (folder / "eval.yaml").write_text(yaml.safe_dump(content))
    return folder / "eval.yaml"


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ({"scores": ["blue"]}, "there is no score blue; allowed are bleu"),
        ({"scores": ["fid"]}, "score fid is about pictures and reconstructions"),
        (
            {"file": "pictures.yaml", "scores": ["fid"]},
            "score fid needs files .* give --inception PATH or models.in",
        ),
        ({"file": "pictures.yaml", "scores": ["lpips"]}, "score lpips needs files .* give --vgg PATH or models.vgg in"),
        ({"file": "pictures.yaml", "scores": ["clip_score"]}, "give --clip PATH or models.clip in"),
        ({"scores": ["bertscore"]}, "give --bert PATH or models.bert in"),
        ({"scores": ["meteor"]}, "give --wordnet PATH or models.wordnet in"),
        ({"scores": ["pope"]}, "score pope needs format pope, but the task's format is rows"),
        ({"file": "geneval.jsonl", "format": "geneval", "scores": ["psnr"]}, "needs `target`, which entry 00000 of"),
        ({"format": "pope"}, "key `images_dir` is missing"),
        ({"format": "rose"}, "`format` is rose, but must be one of rows, pictures, geneval"),
        ({"file": "nothing.yaml"}, "`file` .*nothing.yaml is not there"),
        ({"template": "Answer."}, "`template` must hold {}"),
        ({"batch_size": 0}, "`batch_size` is 0, but must be at least 1"),
        ({"scale": 1}, "unknown key `scale`"),
    ],
)
def test_tasks_that_cannot_be_done_are_one_sentence(tmp_path, task, sentence):
    config = write(tmp_path, task)
    with pytest.raises(ConfigError, match=sentence):
        read_tasks(read_settings(config))


def test_models_of_others_are_looked_for_where_they_are_said_to_be(tmp_path):
    config = write(tmp_path, {}, models={"clip": "no"})
    with pytest.raises(ConfigError, match=r"models.clip: .*no is not there; fix it in .* or give --clip PATH"):
        read_settings(config)
    assert read_settings(config, {"clip": str(tmp_path)}).models.clip == str(tmp_path)


def test_the_example_can_be_done():
    items = read_tasks(read_settings(EXAMPLES / "evaluation.yaml"))
    assert all(items.values()) and items["captions"][0].references == ("A red circle.", "A red disc on white.")
