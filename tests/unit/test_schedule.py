"""Learning-rate values, step by step."""

import math

import pytest

from megabagel.config.schema import OptimizerConfig
from megabagel.training.schedule import lr_at


def values(steps, train_steps=100, **settings):
    return [lr_at(step, OptimizerConfig(lr=1.0, **settings), train_steps) for step in steps]


def test_warm_up_starts_at_zero_and_reaches_the_full_rate_after_its_steps():
    assert values([0, 1, 3, 4, 5], lr_warmup_steps=4) == [0.0, 0.25, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("style", ["constant", "cosine", "linear"])
def test_without_warm_up_the_first_step_has_the_full_rate(style):
    assert values([0], lr_warmup_steps=0, lr_decay_style=style) == [1.0]


def test_constant_stays():
    assert values([50, 99, 1000], lr_warmup_steps=10) == [1.0, 1.0, 1.0]


def test_linear_falls_to_the_minimum_and_stays_there():
    found = values([10, 60, 110, 500], 110, lr_warmup_steps=10, lr_decay_style="linear", min_lr=0.1)
    assert found == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_cosine_falls_along_half_a_period():
    found = values([10, 35, 60, 110, 500], 999, lr_warmup_steps=10, lr_decay_steps=110, lr_decay_style="cosine")
    assert found == pytest.approx([1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.0, 0.0], abs=1e-12)


def test_a_warm_up_longer_than_the_run_only_warms_up():
    assert values([0, 50, 99], lr_warmup_steps=2000, lr_decay_style="cosine") == [0.0, 0.025, 0.0495]
