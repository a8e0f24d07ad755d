"""Held-out losses are the same in every parallel layout, at any time, and training does not notice that they are taken.

The layouts are some of `layouts/table.py`, the packs those of `layouts/packs.py`; whole runs read files.
"""

import functools
import math
import re

import pytest
import torch
import yaml

from megabagel.checkpoint.folder import metrics_of
from megabagel.training.loss_table import metric_names
from tests.distributed.layouts import validate
from tests.distributed.layouts.table import MODELS, TABLE
from tests.tiny_data import training_options, write_data

LIMIT = 300.0
LAYOUTS = (
    "1 process, full recompute",
    "TP2+SP, selective recompute",
    "CP2",
    "PP2",
    "PP2 x VP2 x DP2, overlap",
    "TP2 x EP2, sparse",
)
TOLERANCE = 1e-5


def known(values: dict[str, float | None]) -> dict[str, float | None]:
    """Without the time that it took."""
    return {name: value for name, value in values.items() if name != "validation/seconds"}


def differing(one: dict[str, float | None], other: dict[str, float | None], tolerance: float) -> dict:
    """Values that are not alike."""
    pairs = {name: (one.get(name, math.nan), other.get(name, math.nan)) for name in one.keys() | other.keys()}
    return {
        name: (a, b)
        for name, (a, b) in pairs.items()
        if (a is None) != (b is None) or (a is not None and not abs(a - b) <= tolerance * abs(b))
    }


@pytest.fixture(scope="module")
def reference(pool):
    """What one process measures, by model."""

    @functools.cache
    def train(model: str) -> validate.Validated:
        return pool.run(validate.train, MODELS[model], validate.HELD_OUT, processes=1, limit=LIMIT)[0]

    return train


@pytest.mark.parametrize("name", LAYOUTS)
def test_held_out_losses_do_not_depend_on_the_layout_nor_training_on_them(name, pool, reference):
    layout = TABLE[name]
    run = functools.partial(pool.run, validate.train, layout.options)
    ranks = {"processes": layout.processes, "limit": LIMIT}
    for validated, undisturbed in zip(run(validate.HELD_OUT, **ranks), run(**ranks), strict=True):
        assert validated.steps == undisturbed.steps
        assert all(torch.equal(a, b) for a, b in zip(validated.tensors, undisturbed.tensors, strict=True))
        for ours, expected in zip(validated.measured, reference(layout.model).measured, strict=True):
            assert differing(known(ours), known(expected), TOLERANCE) == {}


def test_a_held_out_loss_is_the_training_loss_of_the_same_packs(pool):
    (alone,) = pool.run(validate.train, {}, validate.TRAINED[:1], processes=1, limit=LIMIT)
    for name in ("ce", "mse"):
        expected = getattr(alone.steps[0], name)
        for weights in ("validation/", "validation/ema/"):
            assert alone.measured[0][weights + name] == pytest.approx(expected, rel=1e-6), name


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Data files to train on and to hold out."""
    folder = tmp_path_factory.mktemp("data")
    return write_data(folder / "training"), write_data(folder / "held_out", rows=5)


def options(files, run_dir, *extra: str, steps: int = 3) -> list[str]:
    held_out = ["--validation.interval=2", "--validation.packs=3", f"--validation.dataset_config_file={files[1]}"]
    return [*training_options(files[0], run_dir, steps), "--logging.tensorboard=false", *held_out, *extra]


def test_whole_runs_of_one_and_four_processes_measure_the_same(pool, files, tmp_path):
    """Three packs for two replicas: the last one of a step is blank."""
    both = ["--validation.weights=both", "--data.num_workers=1"]
    layout = ["--parallel.tensor_model_parallel_size=2", "--parallel.sequence_parallel=true"]
    off = ["--validation.interval=0"]
    (alone,) = pool.run(validate.run, options(files, tmp_path / "1", *both), processes=1, limit=LIMIT)
    (undisturbed,) = pool.run(validate.run, options(files, tmp_path / "off", *off), processes=1, limit=LIMIT)
    of_ranks = pool.run(validate.run, options(files, tmp_path / "4", *both, *layout), processes=4, limit=LIMIT)
    (together,) = [metrics for metrics in of_ranks if metrics]
    groups = ["t2i_pretrain", "unified_edit", "vlm_sft"]
    names = {prefix + name for prefix in ("validation/", "validation/ema/") for name in metric_names(groups)}
    for one, four, plain in zip(alone, together, undisturbed, strict=True):
        measured, expected = (
            {name: value for name, value in known(line).items() if name.startswith("validation/")}
            for line in (four, one)
        )
        assert set(expected) == (names if one["step"] in (2, 3) else set())
        assert differing(measured, expected, TOLERANCE) == {}
        for name in ("ce", "mse", "grad_norm", "params_norm", "tokens", "samples_seen"):
            assert one[name] == plain[name], name


def test_a_run_that_does_not_get_better_ends_with_a_checkpoint_and_remembers_it(pool, files, tmp_path):
    """A rate of (nearly) zero: the losses are the same each time, so the first is the best."""
    extra = ["--optimizer.lr=1e-30", "--checkpoint.save_interval=50", "--validation.interval=1"]
    start = functools.partial(pool.run, validate.run, processes=1, limit=LIMIT)
    (metrics,) = start(options(files, tmp_path, *extra, "--validation.patience=2", steps=9))
    values = [line["validation/loss"] for line in metrics]
    assert len(values) == 3 and len(set(values)) == 1
    assert metrics_of(tmp_path / "iter_0000003")["validation/loss"] == values[0]
    (metrics,) = start(options(files, tmp_path, *extra, "--validation.patience=2", steps=9))
    assert len(metrics) == 3
    (metrics,) = start(options(files, tmp_path, *extra, "--validation.patience=4", steps=9))
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5]
    assert {line["validation/loss"] for line in metrics} == set(values)


def test_held_out_data_that_cannot_be_used_stop_the_run_with_a_sentence(pool, files, tmp_path):
    empty = tmp_path / "empty"
    content = yaml.safe_load(write_data(empty, ("text",), rows=1).read_text())
    (empty / "text" / "rows.jsonl").write_text("")
    (empty / "data.yaml").write_text(yaml.safe_dump(content))
    arguments = options(files, tmp_path / "run", f"--validation.dataset_config_file={empty / 'data.yaml'}")
    (sentence,) = pool.run(validate.refusal, arguments, processes=1, limit=LIMIT)
    assert re.fullmatch("held-out data .*/data.yaml: group vlm_sft has no readable row. .*", sentence)
    arguments = options(files, tmp_path / "run", "--validation.patience=1", "--checkpoint.best_metric=validation/nll")
    (sentence,) = pool.run(validate.refusal, arguments, processes=1, limit=LIMIT)
    assert "best_metric is validation/nll, which no validation measures; allowed are validation/loss, " in sentence
