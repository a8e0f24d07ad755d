"""Slices of released tensors out of a checkpoint of ours: equal to those of the whole, and nothing else is read."""

import pytest
import torch

from megabagel.checkpoint import folder, torch_dist
from megabagel.checkpoint.pieces import Place
from megabagel.checkpoint.released import TorchDistSource
from megabagel.checkpoint.torch_dist_writer import PieceWriter, finish
from megabagel.config.schema import ModelConfig

MODEL = ModelConfig(hidden_size=16, num_layers=3, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=24)
SHAPES = {
    "decoder.layers.gen.linear_qkv.weight": (3, 32, 16),
    "decoder.layers.und.linear_qkv.bias": (3, 32),
    "decoder.layers.und.mlp.linear_fc1.weight": (3, 48, 16),
    "decoder.layers.und.mlp.linear_fc2.weight": (3, 16, 24),
    "heads.lm_head.weight": (40, 16),
    "heads.und_norm.weight": (16,),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> TorchDistSource:
    run_dir = tmp_path_factory.mktemp("run")
    partial = folder.begin(run_dir, 1)
    writer = PieceWriter(partial, 0)
    draw = torch.Generator().manual_seed(0)
    pieces = []
    for key, shape in SHAPES.items():
        values = torch.randn(shape, generator=draw)
        cut = values.numel() // 3 + 1  # stored pieces do not end where rows do
        place = Place(key, shape, (0,) * len(shape), shape)
        for part, start in ((values.flatten()[:cut], 0), (values.flatten()[cut:], cut)):
            pieces += place.flat(part, start)
    files = finish(partial, [writer.write(pieces)], {"run": {}})
    folder.finish(run_dir, 1, {name: folder.FileRecord(file.size, file.crc32) for name, file in files.items()})
    return TorchDistSource(run_dir, MODEL)


def test_every_slice_is_that_of_the_whole_tensor(source):
    names = source.names()
    assert len(names) == 3 * (3 + 3 + 2 + 1) + 2
    for name in names:
        whole = source.export(source.stored_as(name))[name]
        shape = tuple(whole.shape)
        assert torch.equal(source.read(name, shape, None, 0, 0), whole)
        for dim in range(len(shape)):
            half = shape[dim] // 2
            for start, stop in ((0, half), (half, shape[dim]), (1, shape[dim] - 1)):
                part = source.read(name, shape, dim, start, stop)
                assert torch.equal(part, whole.narrow(dim, start, stop - start)), (name, dim, start)


def test_only_what_is_asked_for_is_read(source, monkeypatch):
    read = []
    load = torch_dist.load_tensor
    monkeypatch.setattr(torch_dist, "load_tensor", lambda *entry: read.append(t := load(*entry)) or t)
    source.read("language_model.lm_head.weight", (40, 16), 0, 38, 40)
    assert 0 < sum(stored.numel() for stored in read) < 40 * 16
