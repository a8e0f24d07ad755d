"""Pieces of tensors: flat ranges as rectangles, and their way through a checkpoint's files."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megabagel.checkpoint import pieces
from megabagel.checkpoint.errors import UnreadableError
from megabagel.checkpoint.file_record import record_of
from megabagel.checkpoint.pieces import Piece, Place, rectangles
from megabagel.checkpoint.torch_dist import TorchDist
from megabagel.checkpoint.torch_dist_writer import PieceWriter, finish
from megabagel.config.schema import ParallelConfig
from megabagel.runtime.distributed import destroy, initialize

from megatron.core import dist_checkpointing  # isort: skip  after the adapter

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def ranges(draw) -> tuple[tuple[int, ...], int, int]:
    shape = draw(SHAPES)
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@given(ranges())
def test_rectangles_hold_exactly_the_elements_of_a_flat_range_in_order(case):
    shape, start, end = case
    tensor = torch.arange(math.prod(shape)).view(shape)
    found = list(rectangles(shape, start, end))
    parts = [tensor[tuple(slice(o, o + n) for o, n in zip(*r, strict=True))].flatten() for r in found]
    assert torch.cat([*parts, torch.empty(0, dtype=torch.long)]).tolist() == list(range(start, end))
    assert len(found) <= max(1, 2 * len(shape) - 1)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "LIMIT", 40)


@given(shape=SHAPES, layers=st.integers(1, 3), cuts=st.lists(st.floats(0, 1), max_size=3), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_what_ranks_write_is_read_equally_by_any_other_cut(shape, layers, cuts, seed, tmp_path_factory):
    """Each layer of a stacked tensor is cut at random into flat shards that other ranks hold; so is what is read."""
    folder, generator = tmp_path_factory.mktemp("pieces"), torch.Generator().manual_seed(seed)
    whole = torch.randn((layers, *shape), generator=generator)
    size = math.prod(shape)
    bounds = [0, *sorted(int(c * size) for c in cuts), size]

    def place(layer: int) -> Place:
        return Place("w", (layers, *shape), (layer, *[0] * len(shape)), (1, *shape))

    written = []
    for rank, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        mine = [
            piece
            for layer in range(layers)
            for piece in place(layer).flat(whole[layer].flatten()[start:end], start, torch.bfloat16)
        ]
        written.append(PieceWriter(folder, rank).write(mine, {f"rng/shard_{rank}_{len(cuts) + 1}": {"rank": rank}}))
    files = finish(folder, written, {"run": {"step": 3}})
    assert files == {p.name: record_of(p) for p in folder.iterdir()}
    tensors = TorchDist(folder)
    expected = whole.bfloat16()
    assert tensors.shapes == {"w": tuple(whole.shape)} and tensors.dtypes == {"w": torch.bfloat16}
    assert torch.equal(tensors.read("w"), expected) and torch.equal(tensors.read("w", (layers - 1,)), expected[-1])
    assert tensors.read_object(f"rng/shard_0_{len(cuts) + 1}") == {"rank": 0}
    start, end = size // 3, size - size // 4
    out = torch.full((layers, size), 7.0)
    tensors.read_into([p for i in range(layers) for p in place(i).flat(out[i, start:end], start)])
    inside = torch.zeros(layers, size, dtype=torch.bool)
    inside[:, start:end] = True
    assert torch.equal(out, torch.where(inside, expected.float().view(layers, size), torch.tensor(7.0)))


def test_large_pieces_are_cut_along_their_first_dimensions_without_a_copy(small_pieces):
    data = torch.arange(60.0)
    parts = Place("w", (2, 5, 12), (1, 0, 0), (1, 5, 12)).whole(data)
    assert all(p.nbytes <= 40 and p.data.untyped_storage().data_ptr() == data.data_ptr() for p in parts)
    assert [p.offsets for p in parts][:3] == [(1, 0, 0), (1, 0, 10), (1, 1, 0)]
    assert torch.equal(torch.cat([p.data.flatten() for p in parts]), data)
    assert sum(p.nbytes for p in Place("w", (60,), (0,), (60,)).whole(data, torch.bfloat16)) == 120


def test_megatron_core_reads_what_is_written(tmp_path):
    bias, scalar = torch.randn(4, 6, dtype=torch.float64), torch.tensor(3.0)
    flat = bias.flatten()
    first = PieceWriter(tmp_path, 0).write(
        [*Place("bias", (4, 6), (0, 0), (4, 6)).flat(flat[:9], 0), *Place("scalar", (), (), ()).whole(scalar)]
    )
    writer = PieceWriter(tmp_path, 1)
    rest = [
        writer.write(Place("bias", (4, 6), (0, 0), (4, 6)).flat(flat[a:b], a)) for a, b in ((9, 10), (10, 20), (20, 24))
    ]
    finish(tmp_path, [first, *rest], {"run": {"step": 3}})
    initialize(ParallelConfig(), seed=1)
    try:
        loaded = dist_checkpointing.load_plain_tensors(str(tmp_path))
        common = dist_checkpointing.load_common_state_dict(str(tmp_path))
    finally:
        destroy()
    assert torch.equal(loaded["bias"], bias) and torch.equal(loaded["scalar"], scalar)
    assert common["run"] == {"step": 3}


def test_a_gap_between_pieces_is_an_error_on_both_sides(tmp_path):
    place = Place("w", (2, 3), (0, 0), (2, 3))
    part = PieceWriter(tmp_path, 0).write(place.flat(torch.ones(5), 0))
    with pytest.raises(ValueError, match=r"pieces of w \(2, 3\) have 5 elements instead of 6"):
        finish(tmp_path, [part], {})
    finish(tmp_path, [part, PieceWriter(tmp_path, 1).write(place.flat(torch.ones(1), 5))], {})
    tensors = TorchDist(tmp_path)
    with pytest.raises(UnreadableError, match="pieces of w are missing"):
        tensors.read_into([Piece("w", (3, 3), (2, 0), torch.ones(1, 3))])
    (tmp_path / "__0_0.distcp").write_bytes(b"x" * part.files["__0_0.distcp"].size)
    with pytest.raises(UnreadableError, match="w cannot be read"):
        tensors.read("w")
