"""Local checkpoints of one rank: what is kept, what is noticed. How ranks agree is tested in tests/distributed."""

import pytest
import torch

from megabagel.checkpoint import folder
from megabagel.checkpoint.errors import UnreadableError
from megabagel.checkpoint.local import LocalStore
from megabagel.checkpoint.pieces import Piece

RUN = {"step": 0, "counters": {"samples": 5}}


def pieces(scale: float) -> list[Piece]:
    values = torch.arange(24.0).view(4, 6) * scale
    return [
        Piece("a", (8, 6), (4, 0), values),
        Piece("a", (8, 6), (1, 2), values[0, :2].view(1, 2) + 1),
        Piece("b", (3,), (0,), torch.full((3,), scale, dtype=torch.bfloat16)),
    ]


def store_with(tmp_path, *steps: int) -> LocalStore:
    store = LocalStore(tmp_path, "run", 3)
    for step in steps:
        assert store.write(step, pieces(step), {"rng/shard_3_4": {"seed": step}}, {**RUN, "step": step}) == 110
    return store


def test_what_was_kept_comes_back_into_the_same_pieces(tmp_path):
    checkpoint = store_with(tmp_path, 7).read(7)
    assert checkpoint.run == {"step": 7, "counters": {"samples": 5}}
    targets = pieces(0)
    checkpoint.read_into(iter(targets))
    assert all(torch.equal(a.data, b.data) for a, b in zip(targets, pieces(7), strict=True))
    assert checkpoint.has_object("rng/shard_3_4") and not checkpoint.has_object("rng/shard_0_4")
    assert checkpoint.read_object("rng/shard_3_4") == {"seed": 7}


def test_the_last_two_are_kept_and_none_of_a_course_that_was_left(tmp_path):
    store = store_with(tmp_path, 10, 20, 30)
    assert store.steps() == [30, 20]
    assert store.write(25, pieces(1), {}, RUN) == 110
    assert store.steps() == [25, 20]
    assert sorted(p.name for p in store.path.glob("iter_*")) == ["iter_0000020", "iter_0000025"]


def test_other_pieces_are_refused_and_nothing_is_filled(tmp_path):
    checkpoint = store_with(tmp_path, 7).read(7)
    for other in (pieces(0)[:2], [*pieces(0), Piece("c", (1,), (0,), torch.zeros(1))]):
        with pytest.raises(UnreadableError, match="was written in another layout or by another model"):
            checkpoint.read_into(other)
        assert not any(piece.data[-1].any() for piece in other if piece.key == "b")


@pytest.mark.parametrize("name", ["__3_0.distcp", "contents.pt", folder.FILES])
def test_damage_is_noticed(name, tmp_path):
    store = store_with(tmp_path, 7, 8)
    path = folder.step_folder(store.path, 8) / name
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(whole)
    with pytest.raises(UnreadableError, match="local checkpoint .*iter_0000008"):
        store.read(8)
    path.write_bytes(whole[:-1])
    assert store.steps() == [7]
    assert store.read(7).run["step"] == 7


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    store = store_with(tmp_path, 7)
    with pytest.raises(AttributeError):
        store.write(8, [*pieces(1), None], {}, RUN)
    assert store.steps() == [7] and [p.name for p in store.path.glob("iter_*")] == ["iter_0000007"]
