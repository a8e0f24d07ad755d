"""What a rank writes and reads of the live state: spread over ranks, and right for weights that are kept quantised."""

import pytest
import torch

from megabagel.checkpoint import distributed as checkpoint
from megabagel.checkpoint import held
from megabagel.checkpoint.held import Held
from megabagel.runtime.distributed import destroy
from tests.distributed.layouts.run import make_trainer


@pytest.fixture(autouse=True)
def no_groups_stay():
    yield
    destroy()


def test_frozen_weights_kept_in_fp8_are_stored_plainly_and_quantised_again(tmp_path, monkeypatch):
    """A stand-in for such a weight holds twice its value."""
    run = make_trainer({"model.freeze_vit": True, "checkpoint.run_dir": str(tmp_path)})
    weight = run.stages[0].module.vision.layers[0].mlp.fc1.weight
    assert not weight.requires_grad
    monkeypatch.setattr(held, "is_float8tensor", lambda tensor: tensor.data_ptr() == weight.data_ptr())
    monkeypatch.setattr(held, "dequantize_fp8_tensor", lambda tensor: tensor.detach() / 2)
    before = weight.detach().clone()
    (piece,) = [
        p for p in Held(run.stages, run.optimizer, None).to_write() if p.key.endswith("layers.0.mlp.fc1.weight")
    ]
    assert torch.equal(piece.data.view_as(before), before / 2)
    run.save()
    with torch.no_grad():
        weight.zero_()
    assert checkpoint.load(tmp_path, run.stages, run.optimizer, None).step == 0
    assert torch.equal(weight, before / 2)
