"""What each official format becomes: items, losses, conditions and draws."""

import io
import json
from collections import Counter

import numpy as np
from PIL import Image

from megabagel.config.datasets import DatasetPaths, FrameSamplerArgs
from megabagel.data.document import Part, lay_out
from megabagel.data.files.parquet import ROW_GROUPS_IN_MEMORY, WINDOW
from megabagel.data.sources import open_source
from tests.unit.data_fixtures import edit_group, edit_rows, png, t2i_group, t2i_rows, vlm_group, write_parquet

SEED = 7


def shapes(parts: list[Part]) -> list[tuple]:
    """(kind, loss, enable_cfg) of each part."""
    return [(part.kind, part.loss, part.enable_cfg) for part in parts]


def texts(parts: list[Part]) -> list[str]:
    return [part.text for part in parts if part.kind == "text"]


def colours(parts: list[Part]) -> list[int]:
    """What tells the fixtures' one-colour pictures apart."""
    images = [part.image for part in parts if part.image is not None]
    return [Image.open(image.path or io.BytesIO(image.content)).getpixel((0, 0))[0] for image in images]


SEEN = [("vae_image", False, True), ("vit_image", False, True)]
INSTRUCTION = ("text", False, True)
MADE = ("vae_image", True, False)


def test_t2i_is_a_drawn_caption_and_a_noised_picture(tmp_path):
    source = open_source("t2i_pretrain", t2i_group(tmp_path), SEED)
    assert source.blocks == [4] * 6
    parts = lay_out(source.document(13, (0, 13, 0)))
    assert shapes(parts) == [INSTRUCTION, MADE]
    assert source.origin(13).endswith("1.parquet row 1")
    assert colours(parts) == [13]
    captions = Counter(source.document(1, (0, 1, v))[0].text for v in range(60))
    assert set(captions) == {"cat 1", "tree 1 "} and min(captions.values()) > 15
    assert source.document(1, (0, 1, 5))[0] == source.document(1, (0, 1, 5))[0]


def test_t2i_without_captions_says_a_blank(tmp_path):
    rows = t2i_rows([0])
    rows[0]["captions"] = "{}"
    group = t2i_group(tmp_path)
    write_parquet(tmp_path / "t2i" / "0.parquet", rows)
    assert open_source("t2i_pretrain", group, SEED).document(0, (0, 0, 0))[0].text == " "


def test_num_used_data_counts_files_of_parquet_and_lines_of_jsonl(tmp_path):
    group = t2i_group(tmp_path, num_used_data=[1])
    assert sum(open_source("t2i_pretrain", group, SEED).blocks) == 12
    lines = vlm_group(tmp_path, num_used_data=[5])
    source = open_source("vlm_sft", lines, SEED)
    assert [source.origin(row).rsplit(" ", 1)[1] for row in range(5)] == ["1", "2", "3", "4", "5"]
    lines.shuffle_lines, lines.shuffle_seed = True, 3
    source = open_source("vlm_sft", lines, SEED)
    chosen = {source.origin(row) for row in range(5)}
    assert source.blocks == [5] and len(chosen) == 5
    assert chosen != {f"{lines.datasets['one'].jsonl_path} line {n}" for n in range(1, 6)}


def test_an_edit_chain_starts_ends_and_joins_as_the_rule_says(tmp_path):
    group = edit_group(tmp_path)
    write_parquet(tmp_path / "edit" / "0.parquet", edit_rows([0], length=4))
    source = open_source("unified_edit", group, SEED)
    seen = Counter()
    for visit in range(400):
        parts = lay_out(source.document(0, (1, 0, visit)))
        pictures, steps = colours(parts), texts(parts)
        assert pictures == [part.image.number for part in parts if part.image is not None]
        start, end = pictures[0], pictures[-1]
        assert 0 <= start < end <= min(start + 2, 3)
        for step in range(len(steps)):
            assert str(start + step + 1) in steps[step]
        one, joined, stepwise = [*SEEN, INSTRUCTION, MADE], False, False
        if end - start == 1:
            assert shapes(parts) == one
        elif len(steps) == 1:
            joined = True
            assert shapes(parts) == one
            first, second = steps[0].removesuffix(".").split(". ")
            assert str(start + 1) in first and str(end) in second
        else:
            stepwise = True
            assert shapes(parts) == [*one, *SEEN, INSTRUCTION, MADE]
            assert pictures == [start, start, start + 1, start + 1, start + 1, end]
        seen[start, end, joined, stepwise] += 1
    starts = Counter()
    for (start, *_), n in seen.items():
        starts[start] += n
    assert all(100 < starts[start] < 170 for start in range(3))  # uniform
    assert len(seen) == 7  # (0,1) (1,2) (2,3) and (0,2) (1,3) joined or stepwise
    long = sum(n for (s, e, *_), n in seen.items() if e - s == 2)
    joined = sum(n for (_, _, j, _), n in seen.items() if j)
    assert 0.35 < joined / long < 0.65


def test_draws_of_the_official_formats_never_change(tmp_path):
    """Runs resume with the captions, chains and frames that they would have drawn."""
    t2i = open_source("t2i_pretrain", t2i_group(tmp_path), SEED)
    captions = [t2i.document(1, (0, 1, visit))[0].text[0] for visit in range(12)]
    assert "".join(captions) == "ctcccccctctt"
    edit = edit_group(tmp_path)
    write_parquet(tmp_path / "edit" / "0.parquet", edit_rows([0], length=4))
    edits = open_source("unified_edit", edit, SEED)
    chains = [[entry.image.number for entry in edits.document(0, (1, 0, v)) if entry.image] for v in range(6)]
    assert chains == [[0, 2], [1, 3], [1, 2, 3], [2, 3], [1, 3], [1, 2]]
    source = open_source("vlm_sft", video_group(tmp_path), SEED)
    frames = [[entry.image.number for entry in source.document(0, (2, 0, v)) if entry.image] for v in range(4)]
    assert frames == [[0, 4, 8], [0, 3, 6], [0, 2, 4, 7], [0, 4, 6]]


def test_conversations_split_at_pictures_and_only_answers_carry_loss(tmp_path):
    turns = [
        {"from": "human", "value": "Look: <image>\n and <image> which?"},
        {"from": "gpt", "value": "The first."},
        {"from": "human", "value": " Why? "},
        {"from": "gpt", "value": "It is."},
    ]
    lines = [{"conversations": turns, "image": ["0.png", "1.png"]}, {"conversations": turns[2:]}]
    source = open_source("vlm_sft", vlm_group(tmp_path, lines), SEED)
    parts = lay_out(source.document(0, (2, 0, 0)))
    text, image, answer = ("text", False, False), ("vit_image", False, False), ("text", True, False)
    assert shapes(parts) == [text, image, text, image, text, answer, text, answer]
    assert texts(parts) == ["Look:", "and", "which?", "The first.", " Why? ", "It is."]
    assert colours(parts) == [0, 1]
    assert shapes(lay_out(source.document(1, (2, 1, 0)))) == [text, answer]


def video_group(folder):
    lines = [
        {"conversations": [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "a"}], "video": "clip"}
    ]
    group = vlm_group(folder, lines, frame_sampler_args=FrameSamplerArgs(max_num_frames=4, min_num_frames=2))
    (folder / "vlm" / "clip").mkdir()
    for n in range(9):
        (folder / "vlm" / "clip" / f"{n}.png").write_bytes(png(n))
    return group


def test_a_video_is_a_folder_of_frames_sampled_in_order(tmp_path):
    source = open_source("vlm_sft", video_group(tmp_path), SEED)
    lengths = set()
    for visit in range(40):
        parts = lay_out(source.document(0, (0, 0, visit)))
        frames = colours(parts)
        assert frames == sorted(set(frames)) and len(parts) == len(frames) + 2
        assert frames == [part.image.number for part in parts if part.kind == "vit_image"]
        lengths.add(len(frames))
    assert lengths == {2, 3, 4}


def test_row_groups_in_memory_are_bounded(tmp_path):
    source = open_source("t2i_pretrain", t2i_group(tmp_path, 80), SEED)
    assert source.window == WINDOW < ROW_GROUPS_IN_MEMORY < len(source.blocks)
    for row in np.random.default_rng(0).permutation(80):
        source.document(int(row), (0, int(row), 0))
        assert 0 < len(source._rows._cache) <= ROW_GROUPS_IN_MEMORY


def test_several_data_sets_make_one_group(tmp_path):
    group = vlm_group(tmp_path)
    other = tmp_path / "other.jsonl"
    line = {"conversations": [{"from": "gpt", "value": "z"}], "image": []}
    other.write_text(json.dumps(line) + "\n\n" + json.dumps(line))  # a blank line, and no newline at the end
    group.datasets["two"] = DatasetPaths(jsonl_path=str(other), data_dir=str(tmp_path))
    source = open_source("vlm_sft", group, SEED)
    assert source.blocks == [12, 2]
    assert source.origin(13) == f"{other} line 3"
    assert shapes(lay_out(source.document(13, (0, 13, 0)))) == [("text", True, False)]
