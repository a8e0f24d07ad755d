"""When a loss counts as a spike, and that its history outlives the process."""

import random
from types import SimpleNamespace

import pytest

from megabagel.config.schema import FaultsConfig
from megabagel.runtime import events
from megabagel.runtime.give_up import GiveUp
from megabagel.training.spikes import Spikes


def watch(folder, action="log", **settings) -> Spikes:
    alone = SimpleNamespace(rank=0, replica_device_group=SimpleNamespace(size=lambda: 1))
    return Spikes(folder, FaultsConfig(spike_action=action, spike_window=16, **settings), alone)


def look(spikes: Spikes, step: int, ce: float | None, mse: float | None = None) -> int | None:
    return spikes.look(step, {"ce": ce, "mse": mse})


def calm(spikes: Spikes, steps: int = 40) -> None:
    """A loss that falls and shakes, and another that is not in every step."""
    draw = random.Random(0)
    for step in range(1, steps + 1):
        mse = 0.3 + draw.gauss(0, 0.02) if step % 3 else None
        assert not look(spikes, step, 5 - step / 40 + draw.gauss(0, 0.1), mse)


def test_only_a_jump_is_a_spike_and_it_is_recorded(tmp_path):
    spikes = watch(tmp_path)
    calm(spikes)
    assert spikes.found == 0 and events.read(tmp_path) == []
    look(spikes, 41, 4.2, 0.9)
    (event,) = events.read(tmp_path)
    assert (event["kind"], event["step"], event["loss"], event["value"]) == ("spike", 41, "mse", 0.9)
    assert event["median"] == pytest.approx(0.3, abs=0.02) and spikes.values() == {"spikes": 1, "rollbacks": 0}
    for step in range(42, 70):  # another level is reported at first only
        look(spikes, step, 4.0, 0.9 + step % 5 / 100)
    assert 1 < spikes.found < 12


def test_a_loss_that_never_varies_may_vary_a_little(tmp_path):
    spikes = watch(tmp_path)
    for step in range(20):
        assert not look(spikes, step, 2.0)
    look(spikes, 21, 2.19)
    assert spikes.found == 0
    look(spikes, 22, 2.21)
    assert spikes.found == 1


def test_nothing_is_judged_before_the_window_is_full(tmp_path):
    spikes = watch(tmp_path)
    for step in range(15):
        look(spikes, step, 1.0)
    look(spikes, 16, 100.0)
    assert spikes.found == 0


def test_the_history_survives_a_resume_and_a_rollback_forgets_the_spike(tmp_path):
    first, second = watch(tmp_path, "rollback"), watch(tmp_path, "rollback")
    calm(first)
    before = first.state_dict()
    second.load_state_dict(before)
    assert look(first, 41, 9.0) and look(second, 41, 9.0)
    second.load_windows(before)
    second.went_back(41, 30, samples=12)
    assert second.values() == {"spikes": 1, "rollbacks": 1}
    assert {name: second.state_dict()[name] for name in ("ce", "mse")} == {name: before[name] for name in ("ce", "mse")}
    event = events.read(tmp_path)[-1]
    assert [event[name] for name in ("kind", "from_step", "to_step", "skipped_samples")] == ["rollback", 41, 30, 12]


def test_after_too_many_rollbacks_the_run_ends_with_a_sentence(tmp_path):
    spikes = watch(tmp_path, "rollback", max_rollbacks=1)
    calm(spikes)
    assert look(spikes, 41, 9.0)
    spikes.went_back(41, 30, samples=12)
    with pytest.raises(GiveUp, match=r"step 42: ce is 9.5, .* after 1 rollbacks \(faults.max_rollbacks\); lower "):
        look(spikes, 42, 9.5)


def test_none_watches_nothing(tmp_path):
    spikes = watch(tmp_path, "none")
    calm(spikes)
    assert not look(spikes, 41, 9.0) and spikes.values() == {"spikes": 0, "rollbacks": 0}
