"""The data inspector: what it draws is what the model computes, what it counts is what is packed, and its page."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megabagel.data.text import Tokenizer
from megabagel.packing import native
from megabagel.packing.binpack import PackLimits
from megabagel.packing.geometry import Geometry
from megabagel.packing.planner import build_plan
from megabagel.packing.sample import Item, Sample
from megabagel.packing.splits import plan_sample

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools")]

from inspection import charts  # noqa: E402
from inspection.attention import coverage, picture  # noqa: E402
from inspection.items import unpack  # noqa: E402
from inspection.packs_view import Part, sample_view, text_spans  # noqa: E402
from inspection.ways import draw, pack, try_way  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "public-basic"


class PackOf:
    """A pack of samples given as items, with pictures of one grey level each."""

    def __init__(self, *samples: list[Item]) -> None:
        tokenizer = Tokenizer(str(GOLDEN / "ckpt"))
        geometry = Geometry(16, 8, 14, 8, tokenizer.special)
        planned = [
            plan_sample(Sample(items, (0, n, 0), "group", f"row {n}"), geometry, timesteps=[0.0] * 9)
            for n, items in enumerate(samples)
        ]
        self.plan = build_plan(planned, geometry, 16)
        self.vit_images = [_channels_first(pixels) for sample in planned for pixels in sample.vit_pixels]
        self.vae_images = [_channels_first(pixels) for sample in planned for pixels in sample.vae_pixels]
        self.groups = [sample.group for sample in planned]
        self.origins = [sample.origin for sample in planned]
        self.keys = [sample.key for sample in planned]


def _channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def image(kind: str, height: int, width: int, grey: int, **fields) -> Item:
    return Item(kind, pixels=np.full((height, width, 3), grey, dtype=np.uint8), **fields)


def edit_pack() -> PackOf:
    """An edit, then a conversation."""
    edit = [
        image("vae_image", 32, 16, 10),
        image("vit_image", 14, 28, 20),
        Item("text", text_ids=[5, 6, 7]),
        image("vae_image", 32, 32, 30, loss=True),
        Item("text", loss=True, text_ids=[8, 9]),
    ]
    talk = [Item("text", text_ids=[11]), Item("text", loss=True, text_ids=[12, 13], special_token_label=503)]
    return PackOf(edit, talk)


def test_at_one_token_per_cell_the_picture_is_the_attention_mask():
    plan = edit_pack().plan
    length = plan.sequence_length
    expected = np.zeros((length, length), dtype=bool)
    start = split = 0
    for sample in plan.sample_lens.tolist():
        seen, at = np.zeros(length, dtype=bool), start
        while at < start + sample:
            size, mode = int(plan.split_lens[split]), int(plan.split_modes[split])
            inside = slice(at, at + size)
            expected[inside] |= seen
            expected[inside, inside] = np.tril(np.ones((size, size))) if mode == 0 else 1
            seen[inside] |= mode != 2
            at, split = at + size, split + 1
        start += sample
    shares = coverage(plan, 10_000)
    np.testing.assert_array_equal(shares.sum(axis=0), expected)
    modes = np.repeat(plan.split_modes.numpy(), plan.split_lens.numpy())
    np.testing.assert_array_equal(shares.sum(axis=2).argmax(axis=0), modes)


@pytest.mark.parametrize("side", [7, 16, 29])
def test_a_smaller_picture_keeps_the_number_of_visible_pairs(side):
    plan = edit_pack().plan
    full, small = coverage(plan, 10_000), coverage(plan, side)
    cell = plan.sequence_length / side
    np.testing.assert_allclose(small.sum(axis=(1, 2)) * cell**2, full.sum(axis=(1, 2)))
    assert small.sum(axis=0).max() < 1 + 1e-9
    pixels = picture(plan, side)
    assert pixels.shape == (side, side, 4)
    np.testing.assert_array_equal(pixels[..., 3] > 0, small.sum(axis=0) > 0)


def test_a_pack_comes_apart_into_the_items_that_went_in():
    samples = unpack(edit_pack(), timestep_shift=3.0)
    edit, talk = samples
    assert [item.kind for item in edit.items] == ["vae", "vit", "text", "noised", "text"]
    assert [item.tokens for item in edit.items] == [4, 4, 5, 6, 4]
    assert [item.rope for item in edit.items] == [(0, 0), (1, 1), (2, 6), (7, 7), (7, 10)]
    assert [item.learnt for item in edit.items] == [False, False, False, True, False]
    assert edit.items[3].timestep == pytest.approx(0.75)  # 3 * 0.5 / (1 + 2 * 0.5)
    assert [int(item.image[0, 0, 0]) for item in edit.items if item.image is not None] == [10, 20, 30]
    assert edit.items[4].labels.tolist() == [8, 9, 502, -1]
    assert (talk.origin, talk.key, talk.tokens) == ("row 1", (0, 1, 0), 7)
    assert talk.items[1].labels.tolist() == [12, 13, 502, 503]


def test_exactly_the_learnt_part_of_a_text_is_marked():
    tokenizer = Tokenizer(str(GOLDEN / "ckpt"))
    words = tokenizer.encode("a red cat")
    shown, learnt = unpack(PackOf([Item("text", text_ids=words), Item("text", True, text_ids=words)]), 1.0)[0].items
    assert [(span.text, span.learnt) for span in text_spans(shown, tokenizer)] == [
        ("<|im_start|>", False),
        ("a red cat", False),
        ("<|im_end|>", False),
    ]
    assert [span.learnt for span in text_spans(learnt, tokenizer)] == [False, True, True]


def test_dropped_conditions_stand_where_they_were():
    tokenizer = Tokenizer(str(GOLDEN / "ckpt"))
    sample = unpack(edit_pack(), 1.0)[1]
    parts = [Part("vit", True), Part("text", False), Part("text", True, "gone"), Part("text", False)]
    view = sample_view(sample, parts, tokenizer)
    assert [item["dropped"] for item in view["items"]] == [True, False, True, False]
    assert view["items"][2]["spans"][0].text == "gone"
    unknown = sample_view(sample, parts[:2], tokenizer)  # parts that do not belong to it are not shown
    assert [item["dropped"] for item in unknown["items"]] == [False, False]


def test_a_histogram_holds_every_value_once():
    values = np.array([3, 3, 70, 71, 500])
    h = charts.histogram(values, bins=10)
    assert sum(h.counts) == 5 and h.edges[0] == 0 and h.edges[-1] > 500 and h.median == 70
    assert charts.line(h).count(" ") == h.counts.count(0) + 2
    assert charts.svg(h, "text", "samples").count("<rect") == sum(n > 0 for n in h.counts)
    assert charts.histogram(np.array([7])).counts == (1,)


@pytest.mark.skipif(native.PLANNER is None, reason="the C++ planner is not built")
def test_ways_of_packing_pack_the_same_samples_and_the_balanced_one_evens_the_work():
    draws = random.Random(0)
    tokens = [[draws.randint(20, 400) for _ in range(50)], [draws.randint(5, 30) for _ in range(20)], []]
    costs = [[n * n for n in tokens[0]], [9 * n for n in tokens[1]], []]
    drawn = draw([draws.randrange(3) for _ in range(900)], tokens, costs)
    assert drawn.tokens[0] in (tokens[0][0], tokens[1][0]) and set(drawn.groups) == {0, 1}
    limits = PackLimits(900, 1000, 400, 500, 20)
    ways = {name: try_way(name, limits, drawn, [1]) for name in ("greedy", "best_fit", "balanced")}
    assert ways["greedy"].fill < ways["best_fit"].fill <= 1 and ways["balanced"].fill > 0.95
    assert 1 <= ways["balanced"].imbalance < ways["greedy"].imbalance <= ways["greedy"].worst
    for name in ways:
        packs = pack(name, limits, drawn, [1])
        placed = [sample for samples in packs for sample in samples]
        assert len(placed) == len(set(placed)) and all(sum(drawn.tokens[s] for s in p) <= 1000 for p in packs)
