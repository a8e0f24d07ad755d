"""Samples during training: training does not notice them, every layout that can make them makes the same ones."""

import functools
import json

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed.layouts import validate
from tests.tiny_data import training_options, write_data

LIMIT = 300.0
REQUESTS = [
    {"prompt": "a red cat", "height": 32, "width": 48},
    {"question": "what sits near the harbor?", "images": ["seen.png"]},
    {"prompt": "make it golden", "images": ["seen.png"], "height": 32, "width": 48},
    {"question": "a tree?"},
    {"prompt": "a red cat", "height": 32, "width": 32},
]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    Image.new("RGB", (40, 30), "green").save(folder / "seen.png")
    (folder / "prompts.yaml").write_text(yaml.safe_dump(REQUESTS))
    return folder / "prompts.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def options(data, prompts, run_dir, *extra: str) -> list[str]:
    wanted = [f"--samples.prompts_file={prompts}", "--samples.interval=2", "--samples.num_timesteps=3"]
    return [*training_options(data, run_dir), *wanted, "--samples.max_tokens=4", *extra]


def made(run_dir, step: int) -> tuple[list[str | None], list[np.ndarray]]:
    """Answers and pictures."""
    folder = run_dir / "samples" / f"step_{step:07d}"
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(len(REQUESTS)))
    pictures = [np.asarray(Image.open(folder / line["picture"])) for line in lines if "picture" in line]
    return [line["answer"] for line in lines], pictures


def test_training_does_not_notice_samples_and_layouts_make_the_same(pool, data, prompts, tmp_path):
    """On one process, on two replicas of two tensor-parallel ranks, on two context-parallel ranks."""
    layouts = {
        "alone": (1, ()),
        "replicas": (4, ("--parallel.tensor_model_parallel_size=2", "--parallel.sequence_parallel=true",
                         "--parallel.overlap_grad_reduce=true", "--parallel.overlap_param_gather=true")),
        "context": (2, ("--parallel.context_parallel_size=2",)),
    }  # fmt: skip
    for name, (processes, extra) in layouts.items():
        run = functools.partial(pool.run, validate.run, processes=processes, limit=LIMIT)
        with_samples, without = (
            [line for lines in run(options(data, prompts, tmp_path / folder, *extra, *more)) for line in lines]
            for folder, more in ((name, ()), (f"{name}, none", ("--samples.interval=0",)))
        )
        for one, other in zip(with_samples, without, strict=True):
            for value in ("ce", "mse", "grad_norm", "params_norm", "samples_seen"):
                assert one[value] == other[value], (name, value)
        assert not (tmp_path / f"{name}, none" / "samples").exists()
    for step in (2, 3):
        answers, pictures = made(tmp_path / "alone", step)
        assert [picture.shape[:2] for picture in pictures] == [(32, 48), (32, 48), (32, 32)]
        assert [answer is None for answer in answers] == ["prompt" in request for request in REQUESTS]
        for name in ("replicas", "context"):
            others, their_pictures = made(tmp_path / name, step)
            assert others == answers
            for ours, theirs in zip(pictures, their_pictures, strict=True):
                assert np.abs(ours.astype(int) - theirs).max() <= 2
        assert Image.open(tmp_path / "alone" / "samples" / f"step_{step:07d}" / "sheet.png").width > 300
    assert any((a != b).any() for a, b in zip(made(tmp_path / "alone", 2)[1], pictures, strict=True))
    events = EventAccumulator(str(tmp_path / "alone" / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    shown = events.Images("samples/000 a red cat")
    assert [(image.step, image.height, image.width) for image in shown] == [(2, 32, 48), (3, 32, 48)]
    assert "samples/003 a tree?/text_summary" in events.Tags()["tensors"]


def test_layouts_and_models_that_cannot_make_samples_are_refused_with_a_sentence(pool, data, prompts, tmp_path):
    pipeline = ["--parallel.pipeline_model_parallel_size=2"]
    refusals = pool.run(validate.refusal, options(data, prompts, tmp_path, *pipeline), processes=2, limit=LIMIT)
    assert all("samples are made only where every process holds all layers" in sentence for sentence in refusals)
