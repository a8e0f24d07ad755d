"""Checkpoints of every kind of layout: resumed to the bit in the same one, continued equally in another."""

import pytest
import torch

from tests.distributed.layouts import resume
from tests.distributed.layouts.table import row

LIMIT = 150.0
LAYOUTS = {
    "CP2": row(2, cp=2),
    "PP2 x VP2": row(2, pp=2, vp=2),
    "EP2, modality experts": row(2, ep=2),
    "TP2+SP x EP4, one rank for und": row(4, tp=2, sp=True, ep=4, und=1),
    "PP2 x EP2, uneven stages": row(4, pp=2, ep=2, first=1),
    "frozen ViT, PP2 x CP2": row(4, "frozen ViT", pp=2, cp=2),
    "sparse experts, TP2+SP x PP2 x EP2": row(4, "sparse", tp=2, sp=True, pp=2, ep=2),
}
CONTINUED_IN = {
    "CP2": row(1),
    "PP2 x VP2": row(2, tp=2),
    "EP2, modality experts": row(2, tp=2),
    "TP2+SP x EP4, one rank for und": row(1),
    "PP2 x EP2, uneven stages": row(2, ep=2),
    "frozen ViT, PP2 x CP2": row(2, "frozen ViT"),
    "sparse experts, TP2+SP x PP2 x EP2": row(1, "sparse"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_continues_to_the_bit_and_in_another_layout(name, pool, tmp_path):
    layout, other = LAYOUTS[name], CONTINUED_IN[name]
    first = pool.run(resume.train_and_save, layout.options, str(tmp_path), processes=layout.processes, limit=LIMIT)
    if name == "CP2":  # two ranks that hold the same, of which each writes half
        sizes = [file.stat().st_size for file in tmp_path.glob("iter_*/__*_0.distcp")]
        assert len(sizes) == 2 and max(sizes) < 1.05 * min(sizes)
    again = pool.run(resume.resume, layout.options, str(tmp_path), processes=layout.processes, limit=LIMIT)
    for (values, tensors), (same_values, same_tensors) in zip(first, again, strict=True):
        assert values == same_values
        assert len(tensors) > 0 and all(map(torch.equal, tensors, same_tensors))
    continued = pool.run(resume.resume, other.options, str(tmp_path), processes=other.processes, limit=LIMIT)
    expected, found = first[-1][0], continued[-1][0]  # the last rank holds the losses
    for step, other_step in zip(expected, found, strict=True):
        for value in ("ce", "mse", "grad_norm"):
            assert getattr(other_step, value) == pytest.approx(getattr(step, value), rel=1e-5)
