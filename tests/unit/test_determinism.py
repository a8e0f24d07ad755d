"""What the environment may not say when a run must be repeatable to the bit."""

import pytest
import torch

from megabagel.config.errors import ConfigError
from megabagel.runtime.determinism import make_deterministic

NAMES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # restored afterwards, whatever is set meanwhile
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)


def test_libraries_are_told():
    make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0"),
        ("NCCL_ALGO", "NVLS,Ring"),
        ("NCCL_ALGO", "^Tree"),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"),
    ],
)
def test_an_environment_that_forbids_it_is_named(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"training.deterministic .*{name}.*unset it"):
        make_deterministic()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("value", ["Tree", "^NVLS", "^NVLS,NVLSTree"])
def test_what_is_repeatable_may_be_chosen(value, monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", value)
    make_deterministic()
