"""What inspect_checkpoint says of a checkpoint, a BAGEL folder and damage, without loading any of them."""

import sys

import pytest
import torch
import yaml

from megabagel.checkpoint.folder import begin, finish, records
from megabagel.checkpoint.pieces import Place
from megabagel.checkpoint.torch_dist_writer import PieceWriter
from megabagel.checkpoint.torch_dist_writer import finish as finish_files
from megabagel.config.load import load_config, to_yaml
from tests.tiny_data import CHECKPOINT, GOLDEN

sys.path.insert(0, str(GOLDEN.parents[1] / "tools"))
import inspect_checkpoint


def inspect(capsys, *arguments: object) -> tuple[int, str]:
    code = inspect_checkpoint.main([str(argument) for argument in arguments])
    return code, "".join(capsys.readouterr())


def write(run, tensors: dict[str, torch.Tensor], metrics: dict[str, float]) -> None:
    partial = begin(run, 40)
    pieces = [
        p for key, t in tensors.items() for p in Place(key, tuple(t.shape), (0,) * t.dim(), tuple(t.shape)).whole(t)
    ]
    text = to_yaml(load_config([f"--model.folder={CHECKPOINT}", "--optimizer.lr=0.25"]))
    common = {"step": 40, "counters": {"samples": 1234}, "layout": (2, 1, 1, 4, 1), "config_yaml": text}
    finish_files(partial, [PieceWriter(partial, 0).write(pieces)], {"run": common})
    finish(run, 40, records(partial), metrics)


@pytest.fixture
def run(tmp_path):
    weight = torch.arange(12.0).view(3, 4)
    tensors = {"heads.lm_head.weight": weight.bfloat16(), "ema.heads.lm_head.weight": weight}
    write(tmp_path / "run", tensors, {"validation/ce": 2.5})
    return tmp_path / "run"


def test_it_says_what_is_in_a_checkpoint(run, capsys):
    code, text = inspect(capsys, run, "--config", "--tensors", "^ema")
    assert code == 0 and "tensor 2, context 1, expert 1, pipeline 4, data 1" in text
    for line in (
        "step       40",
        "samples    1,234",
        "metrics    validation/ce 2.5",
        "model      mot, 4 layers of 64",
        "ema.heads.lm_head.weight  [3, 4]  float32",
    ):
        assert f"{line}\n" in text
    assert "files      5 with 0.000 GB, with checksums" in text and "  lr: 0.25\n" in text
    assert "moving average      1 tensors                 12 values float32" in text


def test_it_says_what_is_in_a_folder_of_released_weights(capsys):
    code, text = inspect(capsys, CHECKPOINT, "--config", "--verify")
    assert code == 0 and "model      mot, 4 layers of 64\n" in text and "all 167 tensors can be read" in text
    settings = yaml.safe_load(text[text.index("model:\n") : text.index("all 167")])
    assert settings.keys() == {"model"} and settings["model"]["max_latent_size"] == 8


@pytest.mark.parametrize("name", ["__0_0.distcp", "common.pt", ".metadata", "metrics.json"])
def test_a_flipped_bit_in_any_file_is_found(run, name, capsys):
    assert "5 of 5 files have their checksums" in inspect(capsys, run, "--verify")[1]
    path = run / "iter_0000040" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, text = inspect(capsys, run, "--verify")
    assert code == 1 and f"has a damaged file {name}: checksum" in text


def test_differences_are_counted_in_values(run, tmp_path, capsys):
    weight = torch.arange(12.0).view(3, 4)
    changed = weight.clone()
    changed[1, 1:3] += torch.tensor([0.5, -2.0])
    write(tmp_path / "other", {"heads.lm_head.weight": weight.bfloat16(), "ema.heads.lm_head.weight": changed}, {})
    code, text = inspect(capsys, run, "--compare", tmp_path / "other")
    assert code == 1 and "1 of 2 tensors are equal in every value" in text
    assert "22 of 24 values are equal; the largest difference is 2\n" in text
    assert "ema.heads.lm_head.weight: largest difference 2, 83.3% of the values equal" in text
    assert inspect(capsys, run, "--compare", run)[0] == 0
