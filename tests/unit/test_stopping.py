"""A run ends when it is asked to: by signals, by a time limit, by too many starts in vain; and says how it ended."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from megabagel.config.schema import FaultsConfig
from megabagel.runtime import events, exit_codes, stop_signals
from megabagel.runtime.give_up import GiveUp
from megabagel.runtime.outcome import outcome
from megabagel.runtime.stop_signals import StopSignals
from megabagel.training import attempts
from megabagel.training.stopping import SIGNAL, TIME_LIMIT, Stop


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def by_hand(monkeypatch):
    """A start by nobody's scheduler."""
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def test_signals_are_noted_while_the_main_thread_is_busy_and_end_nothing():
    before = signal.getsignal(signal.SIGUSR1)
    with stop_signals.watched() as signals:
        assert signals.received is None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        deadline = time.monotonic() + 30
        while signals.received is None and time.monotonic() < deadline:
            time.sleep(0.01)
    assert signals.received == signal.SIGUSR1  # the first one counts
    assert signal.getsignal(signal.SIGUSR1) == before


def left(numbers: list[signal.Signals], pause: float = 0.0, is_training: bool = True) -> int | None:
    """Exit code of a process that such signals end, `pause` apart; None when they do not end it."""
    child = os.fork()
    if child == 0:
        signals = StopSignals()
        signals.is_training = is_training
        for number in numbers:
            signals.take(number)
            signals._since -= pause
        os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if code == 99 else code


def test_a_second_interrupt_ends_the_process_at_once_but_a_signal_that_was_passed_on_does_not():
    twice = [signal.SIGINT, signal.SIGINT]
    assert left(twice) is None
    assert left(twice, pause=2 * stop_signals.AGAIN_SECONDS) == 130
    assert left([signal.SIGINT, signal.SIGTERM], pause=2 * stop_signals.AGAIN_SECONDS) == 130
    assert left([signal.SIGTERM, signal.SIGTERM], pause=2 * stop_signals.AGAIN_SECONDS) is None


def test_a_worker_whose_sibling_has_died_leaves_when_torchrun_clears_away(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert left([signal.SIGTERM]) is None
    assert left([signal.SIGTERM], is_training=False) == exit_codes.FAILED  # there is nothing to save
    assert left([signal.SIGUSR1], is_training=False) is None  # a person's
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "999")  # so many were started
    assert left([signal.SIGTERM]) == exit_codes.FAILED
    assert left([signal.SIGUSR1]) is None


def test_a_run_stops_for_a_signal_and_before_its_time_limit_a_save_included(alone, monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    signals = StopSignals()
    stop = Stop(FaultsConfig(time_limit_margin=300), signals, device)
    assert stop.agreed(10) is None
    assert stop.agreed(600).kind == TIME_LIMIT  # the save would not be done in time
    assert Stop(FaultsConfig(time_limit_margin=1200), signals, device).agreed(1).kind == TIME_LIMIT
    assert Stop(FaultsConfig(time_limit_margin=None), signals, device).agreed(1e9) is None
    signals.take(signal.SIGUSR1)
    reason = stop.agreed(10)
    assert reason.kind == SIGNAL and "SIGUSR1" in reason.text
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert Stop(FaultsConfig(), StopSignals(), device).agreed(1e9) is None


@pytest.mark.parametrize(
    ("reason", "saved", "code"),
    [
        ("done", True, exit_codes.DONE),
        ("data_end", False, exit_codes.DONE),
        ("early_stop", True, exit_codes.DONE),
        ("signal", True, exit_codes.STOPPED),
        ("time_limit", True, exit_codes.STOPPED),
        ("signal", False, exit_codes.FAILED),
        ("failed", False, exit_codes.FAILED),
        ("give_up", False, exit_codes.GIVE_UP),
    ],
)
def test_the_outcome_is_that_of_the_last_attempt(tmp_path, reason, saved, code):
    assert outcome(tmp_path) == exit_codes.FAILED  # it never began
    attempts.launch(tmp_path, 3)
    attempts.ended(tmp_path, 5, reason, saved)
    assert outcome(tmp_path) == code
    assert outcome(tmp_path, since=time.time() + 1) == exit_codes.FAILED
    attempts.launch(tmp_path, 3)  # killed, or still running
    assert outcome(tmp_path) == exit_codes.FAILED


def test_starts_without_a_new_checkpoint_end_in_a_summary_of_what_each_came_to(tmp_path, by_hand, monkeypatch):
    attempts.launch(tmp_path, 2)
    events.record(tmp_path, "save", step=3, seconds=1.0, blocked=1.0)
    for fate in ("rank 3: the disk is full", None, None):
        attempts.launch(tmp_path, 2)
        if fate:
            events.record(tmp_path, "failure", message=fate)
        else:
            attempts.started(tmp_path, 3)
    with pytest.raises(GiveUp) as error:
        attempts.launch(tmp_path, 2)
    text = str(error.value)
    assert "3 starts in a row" in text and "faults.max_restarts_without_progress, 2" in text
    assert "rank 3: the disk is full" in text and text.count("killed, or its machine was lost") == 2
    events.record(tmp_path, "end", step=None, reason="give_up", saved=False, message="rank 0: the sentence")

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun tries once more
    with pytest.raises(GiveUp, match="gave up: rank 0: the sentence"):
        attempts.launch(tmp_path, 2)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    events.record(tmp_path, "end", step=None, reason="give_up", saved=False, message="")
    for _ in range(3):  # by hand: counted anew
        attempts.launch(tmp_path, 2)


def test_saves_and_orderly_ends_are_progress(tmp_path, by_hand):
    for reason in ("done", "data_end", "early_stop", "signal", "time_limit"):
        attempts.launch(tmp_path, 0)
        attempts.ended(tmp_path, 1, reason, True)
    for step in (2, 3):
        attempts.launch(tmp_path, 0)
        events.record(tmp_path, "save", step=step, seconds=1.0, blocked=1.0)
    for _ in range(10):
        attempts.launch(tmp_path, None)
