"""What each official format becomes: items, losses, conditions and draws."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megabagel.config.datasets import FrameSamplerArgs, load_dataset_groups
from megabagel.data.sources import open_source
from megabagel.data.text import Tokenizer
from tests.unit.data_fixtures import (
    TOKENIZER,
    edit_group,
    edit_rows,
    png,
    t2i_group,
    t2i_rows,
    vlm_group,
    write_parquet,
)

SEED = 7


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TOKENIZER)


def shapes(sample) -> list[tuple]:
    """(type, loss, enable_cfg) of each item."""
    return [(item.type, item.loss, item.enable_cfg) for item in sample.items]


SEEN = [("vae_image", False, True), ("vit_image", False, True)]
INSTRUCTION = ("text", False, True)
MADE = ("vae_image", True, False)


def test_t2i_is_a_drawn_caption_and_a_noised_picture(tmp_path, tokenizer):
    source = open_source("t2i_pretrain", t2i_group(tmp_path), tokenizer, SEED)
    assert source.blocks == [4] * 6
    sample = source.sample(13, (0, 13, 0))
    assert shapes(sample) == [INSTRUCTION, MADE]
    assert sample.key == (0, 13, 0) and sample.origin.endswith("1.parquet row 1")
    assert sample.items[1].pixels.shape == (16, 32, 3) and (sample.items[1].pixels[0, 0] == [13, 0, 7]).all()
    captions = Counter(tokenizer.decode(source.sample(1, (0, 1, v)).items[0].text_ids) for v in range(60))
    assert set(captions) == {"cat 1", "tree 1 "} and min(captions.values()) > 15
    assert source.sample(1, (0, 1, 5)).items[0].text_ids == source.sample(1, (0, 1, 5)).items[0].text_ids


def test_t2i_without_captions_says_a_blank(tmp_path, tokenizer):
    rows = t2i_rows([0])
    rows[0]["captions"] = "{}"
    group = t2i_group(tmp_path)
    write_parquet(tmp_path / "t2i" / "0.parquet", rows)
    sample = open_source("t2i_pretrain", group, tokenizer, SEED).sample(0, (0, 0, 0))
    assert sample.items[0].text_ids == tokenizer.encode(" ")


def test_num_used_data_counts_files_of_parquet_and_lines_of_jsonl(tmp_path, tokenizer):
    group = t2i_group(tmp_path, num_used_data=[1])
    assert sum(open_source("t2i_pretrain", group, tokenizer, SEED).blocks) == 12
    lines = vlm_group(tmp_path, num_used_data=[5])
    source = open_source("vlm_sft", lines, tokenizer, SEED)
    assert [source.origin(row).rsplit(" ", 1)[1] for row in range(5)] == ["1", "2", "3", "4", "5"]
    lines.shuffle_lines, lines.shuffle_seed = True, 3
    source = open_source("vlm_sft", lines, tokenizer, SEED)
    chosen = {source.origin(row) for row in range(5)}
    assert source.blocks == [5] and len(chosen) == 5
    assert chosen != {f"{lines.datasets['one'].jsonl_path} line {n}" for n in range(1, 6)}


def test_an_edit_chain_starts_ends_and_joins_as_the_rule_says(tmp_path, tokenizer):
    group = edit_group(tmp_path)
    write_parquet(tmp_path / "edit" / "0.parquet", edit_rows([0], length=4))
    source = open_source("unified_edit", group, tokenizer, SEED)
    seen = Counter()
    for visit in range(400):
        sample = source.sample(0, (1, 0, visit))
        colours = [int(item.pixels[0, 0, 0]) for item in sample.items if item.pixels is not None]
        texts = [tokenizer.decode(item.text_ids) for item in sample.items if item.type == "text"]
        start, end = colours[0], colours[-1]
        assert 0 <= start < end <= min(start + 2, 3)
        for step in range(len(texts)):
            assert str(start + step + 1) in texts[step]
        one, joined, stepwise = [*SEEN, INSTRUCTION, MADE], False, False
        if end - start == 1:
            assert shapes(sample) == one
        elif len(texts) == 1:
            joined = True
            assert shapes(sample) == one
            first, second = texts[0].removesuffix(".").split(". ")
            assert str(start + 1) in first and str(end) in second
        else:
            stepwise = True
            assert shapes(sample) == [*one, *SEEN, INSTRUCTION, MADE]
            assert colours == [start, start, start + 1, start + 1, start + 1, end]
        seen[start, end, joined, stepwise] += 1
    starts = Counter()
    for (start, *_), n in seen.items():
        starts[start] += n
    assert all(100 < starts[start] < 170 for start in range(3))  # uniform
    assert len(seen) == 7  # (0,1) (1,2) (2,3) and (0,2) (1,3) joined or stepwise
    long = sum(n for (s, e, *_), n in seen.items() if e - s == 2)
    joined = sum(n for (_, _, j, _), n in seen.items() if j)
    assert 0.35 < joined / long < 0.65


def test_edit_pictures_have_the_sizes_of_their_transforms(tmp_path, tokenizer):
    items = open_source("unified_edit", edit_group(tmp_path), tokenizer, SEED).sample(0, (0, 0, 0)).items
    assert items[0].pixels.shape == (16, 32, 3)  # 20 x 12 to stride 16, shortest side 16
    assert items[1].pixels.shape == (14, 28, 3)  # to stride 14


def test_conversations_split_at_pictures_and_only_answers_carry_loss(tmp_path, tokenizer):
    turns = [
        {"from": "human", "value": "Look: <image>\n and <image> which?"},
        {"from": "gpt", "value": "The first."},
        {"from": "human", "value": " Why? "},
        {"from": "gpt", "value": "It is."},
    ]
    lines = [{"conversations": turns, "image": ["0.png", "1.png"]}, {"conversations": turns[2:]}]
    source = open_source("vlm_sft", vlm_group(tmp_path, lines), tokenizer, SEED)
    sample = source.sample(0, (2, 0, 0))
    kinds = [(item.type, item.loss, item.enable_cfg) for item in sample.items]
    text, image, answer = ("text", False, False), ("vit_image", False, False), ("text", True, False)
    assert kinds == [text, image, text, image, text, answer, text, answer]
    texts = [tokenizer.decode(item.text_ids) for item in sample.items if item.type == "text"]
    assert texts == ["Look:", "and", "which?", "The first.", " Why? ", "It is."]
    assert sample.items[1].pixels[0, 0].tolist() == [0, 0, 7] and sample.items[3].pixels[0, 0].tolist() == [1, 0, 7]
    assert [item.type for item in source.sample(1, (2, 1, 0)).items] == ["text", "text"]


def test_pictures_of_a_conversation_share_the_pixel_budget(tmp_path, tokenizer):
    turn = [{"from": "human", "value": "<image><image>x"}, {"from": "gpt", "value": "y"}]
    single = [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": "y"}]
    lines = [{"conversations": turn, "image": ["0.png", "0.png"]}, {"conversations": single, "image": "0.png"}]
    group = vlm_group(tmp_path, lines)
    group.image_transform_args.max_pixels = 28 * 28
    source = open_source("vlm_sft", group, tokenizer, SEED)
    assert source.sample(1, (0, 0, 0)).items[0].pixels.shape == (28, 28, 3)
    assert source.sample(0, (0, 0, 0)).items[0].pixels.shape == (14, 14, 3)


def test_a_video_is_a_folder_of_frames_sampled_in_order(tmp_path, tokenizer):
    lines = [
        {"conversations": [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "a"}], "video": "clip"}
    ]
    group = vlm_group(tmp_path, lines, frame_sampler_args=FrameSamplerArgs(max_num_frames=4, min_num_frames=2))
    (tmp_path / "vlm" / "clip").mkdir()
    for n in range(9):
        (tmp_path / "vlm" / "clip" / f"{n}.png").write_bytes(png(n))
    source = open_source("vlm_sft", group, tokenizer, SEED)
    lengths = set()
    for visit in range(40):
        items = source.sample(0, (0, 0, visit)).items
        frames = [int(item.pixels[0, 0, 0]) for item in items if item.type == "vit_image"]
        assert frames == sorted(set(frames)) and len(items) == len(frames) + 2
        lengths.add(len(frames))
    assert lengths == {2, 3, 4}


def test_row_groups_in_memory_are_bounded(tmp_path, tokenizer):
    source = open_source("t2i_pretrain", t2i_group(tmp_path), tokenizer, SEED)
    for row in np.random.default_rng(0).permutation(24):
        source.sample(int(row), (0, int(row), 0))
        assert len(source._rows._cache) <= source.window


def test_several_data_sets_make_one_group(tmp_path, tokenizer):
    group = vlm_group(tmp_path)
    other = tmp_path / "other.jsonl"
    line = {"conversations": [{"from": "gpt", "value": "z"}], "image": []}
    other.write_text(json.dumps(line) + "\n\n" + json.dumps(line))  # a blank line, and no newline at the end
    group.datasets["two"] = type(group.datasets["one"])(jsonl_path=str(other), data_dir=str(tmp_path))
    source = open_source("vlm_sft", group, tokenizer, SEED)
    assert source.blocks == [12, 2]
    assert source.origin(13) == f"{other} line 3"
    assert shapes(source.sample(13, (0, 13, 0))) == [("text", True, False)]


def test_the_documented_data_file_is_valid(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    (tmp_path / "data.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    groups = load_dataset_groups(str(tmp_path / "data.yaml"))
    assert list(groups) == ["t2i_pretrain", "unified_edit", "vlm_sft"]
    assert groups["vlm_sft"].datasets["chats"].data_dir == str(tmp_path / "vlm" / "images")
