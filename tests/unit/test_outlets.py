"""What people look at while a run goes on: the same names everywhere, and no outlet that breaks stops the run."""

import json
import sys
import urllib.request
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megabagel.config.checks_logging import logging_faults
from megabagel.config.schema import Config, LoggingConfig
from megabagel.training.histograms import HIGH, LOW
from megabagel.training.outlets import Outlets
from megabagel.training.tags import scalars, twins

RECORD = {
    "ce": 2.0,
    "mse": None,
    "grad_norm": 3.0,
    "grad_norm/und": 1.5,
    "groups/t2i/mse": 0.25,
    "mse_t0.0-0.1": 0.5,
    "mse_tokens": 64,
    "tokens/text": 7,
    "flops/vae": 1e9,
    "padding_share": 0.125,
    "reserved_bytes": 2**21,
    "samples_seen": 12,
    "data/faults/over_long": 1,
}


class StandIn:
    """wandb's part that is used; keeps what it was told."""

    def __init__(self):
        self.runs = []

    def init(self, **settings):
        logged = []
        run = SimpleNamespace(
            settings=settings,
            logged=logged,
            log=logged.append,
            define_metric=lambda *_, **__: None,
            finish=lambda: logged.append("finished"),
        )
        self.runs.append(run)
        return run


@pytest.fixture
def stand_in(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delitem(sys.modules, "megabagel.training.wandb_log", raising=False)
    yield module
    sys.modules.pop("megabagel.training.wandb_log", None)


def test_losses_and_norms_have_twins_and_other_values_have_not():
    shown, doubled = scalars(RECORD), twins(RECORD)
    assert shown["groups/t2i/mse"] == 0.25 and shown["grad-norm/und"] == 1.5 and shown["mem_cache"] == 2
    assert {"ce", "grad-norm", "grad-norm/und", "groups/t2i/mse", "mse_t0.0-0.1", "mem-reserved-bytes"} == set(doubled)
    assert {"tokens/text", "flops/vae", "padding-share", "data/faults/over_long"} <= set(shown)
    assert "mse" not in shown


def test_all_outlets_get_the_same_names(tmp_path, stand_in):
    pytest.importorskip("prometheus_client", reason="the extra prometheus is not installed")
    outlets = Outlets(LoggingConfig(wandb_project="p", prometheus_port=0), tmp_path, "seed: 3")
    outlets.call("write", 5, RECORD)
    port = outlets._open["Prometheus"].port
    page = urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=30).read().decode()
    outlets.close()
    outlets.close()
    (run,) = stand_in.runs
    assert run.settings["project"] == "p" and run.settings["config"] == {"seed": 3}
    assert run.logged == [{**scalars(RECORD), "step": 5, "samples": 12}, "finished"]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(scalars(RECORD)) | {f"{tag} vs samples" for tag in twins(RECORD)}
    assert f'megabagel_groups_t2i_mse{{run="{tmp_path.name}"}} 0.25' in page
    assert sum(line.startswith("megabagel_") for line in page.splitlines()) == len(scalars(RECORD)) + 1


def test_a_resumed_run_is_the_same_one_there(tmp_path, stand_in):
    for _ in range(2):
        Outlets(LoggingConfig(tensorboard=False, wandb_project="p"), tmp_path, "{}").close()
    one, two = stand_in.runs
    assert one.settings["id"] == two.settings["id"] and two.settings["resume"] == "allow"


def test_an_outlet_that_breaks_is_dropped_with_one_sentence(tmp_path, stand_in, caplog):
    outlets = Outlets(LoggingConfig(wandb_project="p"), tmp_path, "{}")
    (run,) = stand_in.runs

    def fail(_):
        raise ConnectionError("no route")

    run.log = fail
    for step in (1, 2):
        outlets.call("write", step, RECORD)
    outlets.close()
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == "Weights & Biases failed and gets nothing more of this run: ConnectionError: no route"
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("ce")] == [1, 2]


def test_a_taken_port_does_not_stop_a_run(tmp_path, caplog):
    pytest.importorskip("prometheus_client", reason="the extra prometheus is not installed")
    first = Outlets(LoggingConfig(tensorboard=False, prometheus_port=0), tmp_path, "{}")
    port = first._open["Prometheus"].port
    second = Outlets(LoggingConfig(tensorboard=False, prometheus_port=port), tmp_path, "{}")
    second.call("write", 1, RECORD)
    first.close()
    assert "Prometheus failed" in caplog.text


def test_weights_and_biases_offline_takes_all_kinds_of_values(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    outlets = Outlets(LoggingConfig(tensorboard=False, wandb_project="p"), tmp_path, json.dumps({"seed": 3}))
    outlets.call("write", 1, RECORD)
    outlets.call("write_histogram", 1, "gradients/und", [1.0] * (HIGH - LOW))
    assert outlets._open
    outlets.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"histogram_interval": -1}, "logging.histogram_interval is -1"),
        ({"wandb_project": ""}, "logging.wandb_project is empty"),
        ({"prometheus_port": 70000}, "logging.prometheus_port is 70000"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(settings, fragment):
    config = Config(logging=LoggingConfig(**settings))
    fault = next(logging_faults(config))
    assert fragment in fault and fault.endswith(".")


def test_a_package_that_is_not_there_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = Config(logging=LoggingConfig(wandb_project="p", prometheus_port=9000))
    faults = list(logging_faults(config))
    assert ["megabagel[wandb]" in faults[0], "megabagel[prometheus]" in faults[1]] == [True, True]
