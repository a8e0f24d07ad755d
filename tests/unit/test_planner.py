"""The C++ planner says what the Python planner says, for any pack, at any size, without the interpreter's lock."""

import logging
import os
import random
import sys
import threading
import time
from dataclasses import replace
from importlib.machinery import EXTENSION_SUFFIXES

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megabagel.packing import native, planner, reference
from megabagel.packing.geometry import Geometry, SpecialTokens
from megabagel.packing.plan import FULL, PackPlan
from megabagel.packing.sample import Item, Sample
from megabagel.packing.splits import PlannedSample, plan_sample

compiled = pytest.mark.skipif(native.PLANNER is None, reason="the C++ planner is not built")
SPECIAL = SpecialTokens(bos=501, eos=502, start_of_image=503, end_of_image=504)
GEOMETRY = Geometry(16, max_latent_size=8, vit_patch_size=14, vit_max_num_patch_per_side=9, special_tokens=SPECIAL)


def assert_same(a: PackPlan, b: PackPlan) -> None:
    for name, ours in vars(a).items():
        theirs = getattr(b, name)
        if isinstance(ours, torch.Tensor):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
            assert torch.equal(ours, theirs), name
        else:
            assert ours == theirs, name


def picture(kind: str, rows: int, columns: int) -> np.ndarray:
    stride = GEOMETRY.stride(kind)
    return np.broadcast_to(np.uint8(0), (rows * stride, columns * stride, 3))


def random_items(draw: random.Random, side: int) -> list[Item]:
    """Texts, pictures and clips of frames that share a split."""
    items = []
    for _ in range(draw.randint(1, 6)):
        kind = draw.choice(["text", "vit_image", "vae_image"])
        label = draw.choice([None, None, 7])
        if kind == "text":
            ids = [draw.randrange(500) for _ in range(draw.choice([0, 1, 3, 9]))]
            items.append(Item("text", draw.random() < 0.5, text_ids=ids, special_token_label=label))
            continue
        frames, noised = draw.choice([1, 1, 3]), kind == "vae_image" and draw.random() < 0.5
        for frame in range(frames):
            pixels = picture(kind, draw.randint(1, side), draw.randint(1, side))
            first, last = frame == 0, frame == frames - 1
            loss = noised and (frames == 1 or draw.random() < 0.8)
            item = Item(kind, loss, pixels=pixels, special_token_label=label, split_start=first, split_end=last)
            items.append(replace(item, frame_delta=None if last else draw.randint(0, 4)))
    return items


def random_pack(draw: random.Random, geometry: Geometry) -> list[PlannedSample]:
    samples = []
    for number in range(draw.randint(1, 4)):
        items = random_items(draw, 12 if geometry.interpolate_pos else 8)
        dropped = [draw.random() < 0.2 for _ in items]
        dropped[draw.randrange(len(items))] = False
        samples.append(plan_sample(Sample(items, (3, number, 0), "g", "made by hand"), geometry, dropped))
    return samples


@compiled
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([1, 16, 48]))
def test_native_and_reference_plans_are_equal(seed, interpolate, tile):
    draw = random.Random(seed)
    geometry = replace(GEOMETRY, interpolate_pos=interpolate)
    for _ in range(15):
        samples = random_pack(draw, geometry)
        tokens = sum(sample.num_tokens for sample in samples)
        total = draw.choice([None, planner.fixed_length(tokens, tile), tokens // tile * tile])
        plans = []
        for build in (native.build_plan, reference.build_plan):
            try:
                plans.append(build(samples, geometry, tile, total))
            except ValueError as error:
                plans.append(str(error))
        if isinstance(plans[1], str):
            assert plans[0] == plans[1] and "raise data.max_num_tokens" in plans[1]
        else:
            assert_same(*plans)


@pytest.mark.parametrize("build", [pytest.param(native.build_plan, marks=compiled), reference.build_plan])
def test_packs_that_cannot_be_are_refused(build):
    with pytest.raises(ValueError, match="a pack needs at least one sample"):
        build([], GEOMETRY, 16)
    sample = plan_sample(Sample([Item("text", text_ids=[1])], (0,), "g", "o"), GEOMETRY)
    with pytest.raises(ValueError, match="fixed pack length 40 must be a multiple of 16"):
        build([sample], GEOMETRY, 16, 40)
    with pytest.raises(ValueError, match="3 text and ViT tokens and 0 latent tokens pads to 32 rows, more .* 16;"):
        build([sample], GEOMETRY, 16, 16)


def arrays(**changes) -> dict:
    """One sample: a text of 2 tokens and an image of 2 x 3."""
    pieces = np.array(
        [[0, 4, 0, 1, 0, 1, 0, 0, -1, -1, 0, 0], [1, 8, 4, 1, 1, 0, 2, 3, 0, 2, 0, 0]],
        dtype=np.int64,
    )
    values = {
        "pieces": pieces,
        "timesteps": np.zeros(2, np.float32),
        "text_ids": np.array([5, 6]),
        "sample_lens": np.array([12]),
        "buckets": np.array([0, 7, 0, 3, 6]),
        "geometry": (1, 2, 3, 4, 8, 8),
        "tile": 16,
        "total_length": None,
    }
    for (row, column), value in changes.pop("spoil", {}).items():
        pieces[row, column] = value
    return {**values, **changes}


@compiled
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spoil": {(1, 0): 3}}, "piece 1 of the pack has kind 3 and mode 1, but both must be 0, 1 or 2"),
        ({"spoil": {(0, 1): 1}}, "piece 0 .* has 1 tokens, but must have 2"),
        ({"spoil": {(0, 2): 2**60}}, "starts at RoPE id 1152921504606846976"),
        ({"spoil": {(1, 6): 3}}, "piece 1 .* image of 3 x 3 tokens, but has 6"),
        ({"spoil": {(1, 9): 3}}, "positions of its columns from entry 3 on, but the tables hold 5 entries"),
        ({"spoil": {(1, 8): -2}}, "positions of its rows from entry -2"),
        ({"spoil": {(0, 3): 0}}, "piece 0 .* continues a split, but is the first of its sample"),
        ({"sample_lens": np.array([11])}, "piece 1 of the pack reaches beyond the end of its sample"),
        ({"sample_lens": np.array([4])}, "piece 1 of the pack belongs to no sample"),
        ({"sample_lens": np.array([12, 2])}, "the samples of the pack hold more tokens than their pieces"),
        ({"sample_lens": np.array([0])}, "sample 0 of the pack has 0 tokens"),
        ({"text_ids": np.array([5])}, "the texts of the pack have 2 tokens, but 1 token ids are given"),
        ({"buckets": np.array([0, 7, 0, -3, 6])}, "entry 3 of the position tables is -3"),
        ({"timesteps": np.zeros(3, np.float32)}, "every piece needs a timestep: 3 are given for 2 pieces"),
        ({"pieces": np.zeros((2, 11), np.int64)}, "a table of 12 columns"),
        ({"geometry": (1, 2, 3, 4, 0, 8)}, "sides of position tables must lie in 1 .."),
        ({"tile": 0}, "the tile is 0, but must be positive"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(changes, message):
    native.PLANNER.build_plan(**arrays())
    with pytest.raises(ValueError, match=message):
        native.PLANNER.build_plan(**arrays(**changes))


@compiled
def test_the_planner_takes_no_array_of_another_type():
    with pytest.raises(TypeError):
        native.PLANNER.build_plan(**arrays(text_ids=np.array([5, 6], dtype=np.int32)))


def bytes_of(plan: PackPlan) -> int:
    return sum(value.nbytes for value in vars(plan).values() if isinstance(value, torch.Tensor))


def repeated_pack(times: int) -> list[PlannedSample]:
    image, clean = picture("vae_image", 8, 8), picture("vit_image", 8, 8)
    items = [Item("vit_image", pixels=clean), Item("text", True, text_ids=[5] * 116), Item("vae_image", pixels=image)]
    sample = plan_sample(Sample([*items, Item("vae_image", True, pixels=image)], (0,), "g", "o"), GEOMETRY)
    return [sample] * times


@compiled
def test_a_million_tokens_take_memory_in_proportion():
    small, large = (native.build_plan(repeated_pack(times), GEOMETRY, 16) for times in (8, 3200))
    assert large.sequence_length == 400 * small.sequence_length >= 1_000_000
    assert bytes_of(large) == 400 * bytes_of(small) < 80 * large.sequence_length
    assert_same(large, reference.build_plan(repeated_pack(3200), GEOMETRY, 16))


@compiled
def test_other_threads_run_while_a_pack_is_planned():
    count, stop, interval = [0], threading.Event(), sys.getswitchinterval()

    def advance():
        while not stop.is_set():
            count[0] += 1
            time.sleep(0)

    size = 2000  # an image of 2000 x 2000 tokens
    row = [2, size * size + 2, 0, 1, FULL, 0, size, size, -1, -1, 0, 0]
    values = arrays(pieces=np.array([row]), timesteps=np.zeros(1, np.float32), text_ids=np.empty(0, np.int64))
    values["sample_lens"] = np.array([size * size + 2])
    other = threading.Thread(target=advance, daemon=True)
    other.start()
    sys.setswitchinterval(60)  # so that this thread gives the lock away in the planner only
    try:
        before = count[0]
        native.PLANNER.build_plan(**values)
        assert count[0] > before
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        other.join()


def test_without_a_compiled_planner_there_is_one_warning_and_the_same_plan(monkeypatch, caplog):
    samples = random_pack(random.Random(3), GEOMETRY)
    expected = planner.build_plan(samples, GEOMETRY, 16)
    monkeypatch.setattr(native, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(native, "PLANNER", native._load())
        assert_same(planner.build_plan(samples, GEOMETRY, 16), expected)
        planner.build_plan(samples, GEOMETRY, 16)
    (record,) = caplog.records
    assert "The C++ planner is not built" in record.getMessage()
    assert native.PLANNER is None


@pytest.mark.parametrize(
    ("old", "content", "problem"),
    [(True, b"", "is older than its sources"), (False, b"no library", "could not be loaded")],
)
def test_a_planner_that_is_outdated_or_broken_is_not_used(monkeypatch, caplog, tmp_path, old, content, problem):
    path = tmp_path / f"broken_planner{EXTENSION_SUFFIXES[0]}"
    path.write_bytes(content)
    if old:
        os.utime(path, (0, 0))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(native, "_NAME", "broken_planner")
    assert native._load() is None
    (record,) = caplog.records
    assert problem in record.getMessage()
