"""The data inspector: what it draws is what the model computes, what it counts is what is packed, and its page."""

import contextlib
import io
import json
import random
import re
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
from tests.tiny_data import write_data

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools")]

from inspect_data import main  # noqa: E402
from inspection import charts  # noqa: E402
from inspection.attention import coverage, picture  # noqa: E402
from inspection.items import unpack  # noqa: E402
from inspection.packs_view import Part, sample_view, text_spans  # noqa: E402
from inspection.subject import open_subject  # noqa: E402
from inspection.survey import survey  # noqa: E402
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
    one = charts.histogram(np.array([700]))
    assert len(one.counts) == 12 and sum(one.counts) == 1 and one.edges[0] <= 700 < one.edges[-1]


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


TINY = ["--data.expected_num_tokens=150", "--data.max_num_tokens=260", "--data.max_num_tokens_per_sample=200"]


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    """The tool's page, output and exit code on three groups, one of them with bad rows."""
    folder = tmp_path_factory.mktemp("inspected")
    data = write_data(folder / "data", rows=16)
    lines = folder / "data" / "vlm_sft" / "rows.jsonl"
    lines.write_text(lines.read_text() + '{"conversations": [\n{"conversations": []}\n')
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        arguments = ["--data", str(data), "--tokenizer", str(GOLDEN / "ckpt"), "--html", str(folder / "page.html")]
        code = main([*arguments, "--packs", "2", "--strict", "--model.folder", str(GOLDEN / "ckpt"), *TINY])
    return (folder / "page.html").read_text(), output.getvalue(), code


def test_bad_rows_are_told_and_strict_fails(inspected):
    page, output, code = inspected
    assert code == 1
    assert "vlm_sft (vlm_sft): 18 rows, 18 measured, 2 bad" in output
    for line in ("rows.jsonl line 17", "rows.jsonl line 18"):
        assert line in output and line in page
    assert ">broken_json 1<" in page and ">bad_row 1<" in page


def test_the_page_needs_no_other_file_and_shows_whole_packs(inspected):
    page, output, _ = inspected
    links = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert links and all(link.startswith("data:image/") for link in links)
    assert page.count("<h2>Pack ") == 2 and page.count('class="attention"') == 2
    assert "<mark>" in page and "VAE picture, noised" in page
    assert "<script" not in page and "{{" not in page
    for group in ("t2i_pretrain", "unified_edit", "vlm_sft"):
        assert f"<h3>{group}</h3>" in page and f"{group} ({group})" in output


def test_text_from_the_data_cannot_break_the_page(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a <b>cat</b> & <script>tree</script>"}\n' * 4)
    transform = {"image_stride": 14, "max_image_size": 56, "min_image_size": 28}
    group = {"datasets": {"one": {"path": "rows.jsonl"}}, "image_transform_args": transform}
    (tmp_path / "data.yaml").write_text(json.dumps({"text": group}))
    target = tmp_path / "page.html"
    arguments = ["--data", str(tmp_path / "data.yaml"), "--tokenizer", str(GOLDEN / "ckpt"), "--html", str(target)]
    assert main([*arguments, "--packs", "1", "--samples", "3", "--strict", *TINY]) == 0
    page = target.read_text()
    assert "&lt;script&gt;" in page and "<script" not in page and "<b>cat" not in page


def test_a_wrong_command_gets_one_sentence(tmp_path, capsys):
    assert main(["--data", str(tmp_path / "none.yaml"), "--tokenizer", str(GOLDEN / "ckpt")]) == 2
    assert main(["--config", "tiny", "--data.dataset_config_file", "x.yaml", "--data.tokenizer", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("inspect_data: ") and line.endswith(".") for line in errors)


def test_processes_measure_what_one_measures(tmp_path):
    data = write_data(tmp_path / "data", rows=16)
    subject = open_subject([f"--data.dataset_config_file={data}", f"--data.tokenizer={GOLDEN / 'ckpt'}", *TINY])
    alone = survey(subject.maker, subject.costs)
    together = survey(subject.maker, subject.costs, processes=2)
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a.table, b.table)
        assert a.faults == b.faults and len(a.table) == 16
