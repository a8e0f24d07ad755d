"""What is logged of a step does not depend on the layout; the layouts are some of `layouts/table.py`."""

import functools
import math

import pytest

from tests.distributed.layouts import monitor
from tests.distributed.layouts.table import MODELS, TABLE

LIMIT = 150.0
# what depends on the layout by its nature: times and rates, memory, padding to the layout's tiles, waiting
OWN = {
    "step_time",
    "data_time",
    "encode_time",
    "log_time",
    "tokens_per_sec",
    "tflops_per_device",
    "official_tflops_per_device",
    "host_memory_bytes",
    "padding_share",
    "bubble_share",
    "encode_balance",
}


@pytest.fixture(scope="module")
def reference(pool):
    @functools.cache
    def train(model: str) -> list[dict[str, float | None]]:
        return pool.run(monitor.train, MODELS[model], processes=1, limit=LIMIT)[0]

    return train


@pytest.mark.parametrize("name", ["TP2+SP x PP2 x DP2", "TP2", "CP2", "DP4, weighted CE", "TP2+SP, moe", "PP2, tied"])
def test_what_is_logged_is_that_of_one_process(name, pool, reference):
    layout = TABLE[name]
    ranks = pool.run(monitor.train, layout.options, processes=layout.processes, limit=LIMIT)
    (found,) = [values for values in ranks if values]
    for ours, expected in zip(found, reference(layout.model), strict=True):
        assert ours.keys() == expected.keys()
        for key in ours.keys() - OWN:
            assert ours[key] == (expected[key] if expected[key] is None else pytest.approx(expected[key], rel=1e-5)), (
                key
            )


def test_parts_add_up_to_the_whole(reference):
    for values in reference("mot"):
        parts = {name: v for name, v in values.items() if name.startswith("grad_norm/") and v is not None}
        assert parts.keys() == {f"grad_norm/{part}" for part in ("und", "gen", "vocabulary", "connectors", "vit")}
        assert math.hypot(*parts.values()) == pytest.approx(values["grad_norm"], rel=1e-5)
        assert all(v > 0 for v in parts.values())
        assert sum(v for name, v in values.items() if name.startswith("tokens/")) == values["tokens"]
        assert values["tokens/vae_noised"] == values["mse_tokens"]
        assert values["groups/even/ce"] != values["groups/odd/ce"]
        low, high = sorted((values["groups/even/ce"], values["groups/odd/ce"]))
        assert low < values["ce"] < high
        assert 0 < values["padding_share"] < 1 and values["bubble_share"] == 0
        assert values["host_memory_bytes"] > 2**26
        times = [v for name, v in values.items() if name.startswith("mse_t0.") and v is not None]
        assert len(times) > 1 and min(times) < values["mse"] < max(times)
    assert 0 < values["ema_distance"] < 0.1


def test_only_steps_that_are_shown_are_looked_at_closely(pool, reference):
    (found,) = pool.run(monitor.train, {"logging.log_interval": 2}, processes=1, limit=LIMIT)
    first, second = found
    for key in ("params_norm", "ema_distance", "grad_norm/und", "groups/even/ce", "host_memory_bytes", "log_time"):
        assert first[key] is None and second[key] is not None
    assert second["groups/even/ce"] == reference("mot")[1]["groups/even/ce"]


def test_histograms_count_every_value_once(pool):
    (alone,) = pool.run(monitor.histograms, {}, processes=1, limit=LIMIT)
    layout = TABLE["TP2+SP x PP2 x DP2"]
    for found in pool.run(monitor.histograms, layout.options, processes=layout.processes, limit=LIMIT):
        assert found.keys() == alone.keys() and len(found) == 10
        for name, counts in found.items():
            assert sum(counts) == sum(alone[name]), name
            # values on the border of two bins may cross it by rounding
            moved = sum(abs(a - b) for a, b in zip(counts, alone[name], strict=True))
            assert moved <= 0.01 * sum(counts) + 2, name
