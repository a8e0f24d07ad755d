"""Every kind of bad row or file is skipped, counted and named; a group without a good row ends the run."""

import json
import logging
import sys

import pytest

from megabagel.config.datasets import DatasetPaths, GroupConfig
from megabagel.data.faults import DataError
from tests.unit.data_fixtures import (
    TRANSFORM,
    edit_group,
    edit_rows,
    make_reader,
    png,
    t2i_group,
    t2i_rows,
    vlm_group,
    vlm_line,
    write_parquet,
)


def faults_after_a_pass(name, group, caplog, **fields) -> tuple[dict, str, set]:
    """Read until every row was seen; fault counts, the log, and the origins of the used rows."""
    with caplog.at_level(logging.WARNING), make_reader({name: group}, **fields) as reader:
        origins = set()
        while reader.state_dict()["counts"][0] < 2 * reader.state_dict()["num_rows"][0]:
            origins |= {origin for pack in reader.next_step() for origin in pack.origins}
        return reader.fault_counts()[name], caplog.text, origins


def test_undecodable_image_and_broken_captions(tmp_path, caplog):
    group = t2i_group(tmp_path)
    rows = t2i_rows(range(8))
    rows[2]["image"] = b"no picture"
    rows[3]["image"] = None
    rows[5]["captions"] = "{broken"
    rows[6]["captions"] = "[1]"
    rows[7]["captions"] = "{}"  # legal: an empty caption
    write_parquet(tmp_path / "t2i" / "0.parquet", rows)
    counts, log, origins = faults_after_a_pass("t2i_pretrain", group, caplog)
    assert set(counts) == {"undecodable_image", "broken_json"}
    for row in (2, 3, 5, 6):
        assert f"0.parquet row {row}: " in log
        assert not any(origin.endswith(f"0.parquet row {row}") for origin in origins)
    assert len(origins) == 4 + 12


def test_truncated_parquet_costs_its_rows_only_and_is_said(tmp_path, caplog):
    group = t2i_group(tmp_path)
    broken = tmp_path / "t2i" / "1.parquet"
    broken.write_bytes(broken.read_bytes()[:-40])
    counts, log, origins = faults_after_a_pass("t2i_pretrain", group, caplog)
    assert counts == {"unreadable_parquet": 1}
    assert "1.parquet: truncated or not a parquet file" in log
    assert len(origins) == 12


def test_damaged_row_group_costs_its_rows_only(tmp_path, caplog):
    group = t2i_group(tmp_path)
    broken = tmp_path / "t2i" / "0.parquet"
    data = bytearray(broken.read_bytes())
    data[4:200] = bytes(196)  # the first pages; footer and other row groups are whole
    broken.write_bytes(bytes(data))
    counts, log, origins = faults_after_a_pass("t2i_pretrain", group, caplog)
    assert counts["unreadable_parquet"] >= 4
    assert "0.parquet row 0: row group 0 cannot be read" in log
    assert len(origins) == 20


def test_missing_column_unlisted_and_missing_files(tmp_path, caplog):
    group = t2i_group(tmp_path)
    write_parquet(tmp_path / "t2i" / "2.parquet", [{"picture": png(1)}])
    info = tmp_path / "info.json"
    listed = {f"/elsewhere/{n}.parquet": {"num_row_groups": 3} for n in (0, 2, 9)}
    info.write_text(json.dumps(listed))
    group.datasets["one"].parquet_info_path = str(info)
    counts, log, origins = faults_after_a_pass("t2i_pretrain", group, caplog)
    assert counts == {"missing_column": 1, "unlisted_parquet": 1, "missing_file": 1}
    assert "2.parquet: column image, captions is missing (found picture)" in log
    assert "1.parquet: not listed in" in log and "9.parquet: listed in" in log
    assert len(origins) == 24  # the unlisted file is read all the same


def test_edit_rows_of_a_wrong_shape(tmp_path, caplog):
    group = edit_group(tmp_path)
    rows = edit_rows(range(6), length=3)
    rows[0]["image_list"] = rows[0]["image_list"][:1]
    rows[1]["instruction_list"] = rows[1]["instruction_list"][:1]
    rows[2]["instruction_list"] = [["a"], []]
    rows[3]["image_list"] = None
    write_parquet(tmp_path / "edit" / "0.parquet", rows)
    counts, log, origins = faults_after_a_pass("unified_edit", group, caplog)
    assert set(counts) == {"bad_row"}
    assert len(origins) == 2
    assert "row 0: image_list has 1 pictures" in log
    assert "row 2: instruction_list must hold 2 non-empty lists for 3 pictures, found 1" in log


def test_conversation_lines(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # as where the extra `video` is not installed
    human, gpt = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}
    (tmp_path / "vlm").mkdir()
    (tmp_path / "vlm" / "clip.mp4").write_bytes(b"")
    lines = [
        vlm_line(0),
        '{"conversations": [',
        "[1, 2]",
        {"conversations": []},
        {"conversations": [{"from": "cat", "value": "meow"}]},
        {"conversations": [human, gpt], "image": "0.png"},
        {"conversations": [{"from": "human", "value": "<image>"}, gpt], "image": "gone.png"},
        "",
        {"conversations": [{"from": "human", "value": "<video>"}, gpt], "video": "clip.mp4"},
        {"conversations": [human, {"from": "gpt", "value": "yes " * 400}]},
        vlm_line(1),
    ]
    counts, log, origins = faults_after_a_pass("vlm_sft", vlm_group(tmp_path, lines), caplog)
    assert set(counts) == {"broken_json", "bad_row", "missing_file", "video_container", "over_long"}
    assert {origin.rsplit(" ", 1)[1] for origin in origins} == {"1", "11"}
    assert "data.jsonl line 2: not valid JSON" in log
    assert "line 3: a JSON object is expected, found list" in log
    assert "line 5: turn 0 must be {from: human or gpt, value: text}, found from: 'cat'" in log
    assert "line 6: 0 <image> in the human turns, but 1 pictures" in log
    assert "line 9: video" in log and "container file; give a folder of its frames" in log
    assert "more than data.max_num_tokens_per_sample = 120" in log


def test_a_group_of_bad_rows_only_ends_after_one_pass(tmp_path, caplog):
    group = vlm_group(tmp_path, ["{broken"] * 5)
    with make_reader({"vlm_sft": group}) as reader:
        with pytest.raises(DataError, match="group vlm_sft: not one of 5 rows of a full pass can be used; the last: "):
            reader.next_step()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unusable_groups_are_refused_at_once(tmp_path, num_workers):
    group = GroupConfig({"one": DatasetPaths(data_dir=str(tmp_path / "gone"))}, TRANSFORM)
    with pytest.raises(DataError, match=r"data set one: folder data_dir .*gone does not exist"):
        make_reader({"t2i_pretrain": group}, num_workers=num_workers)
    (tmp_path / "gone").mkdir()
    with pytest.raises(DataError, match=r"holds no \*.parquet file"):
        make_reader({"t2i_pretrain": group})
    (tmp_path / "gone" / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="group t2i_pretrain has no readable row; the first fault: .*a.parquet"):
        make_reader({"t2i_pretrain": group})
    group = GroupConfig({"one": DatasetPaths(jsonl_path=str(tmp_path / "no.jsonl"), data_dir=".")}, TRANSFORM)
    with pytest.raises(DataError, match=r"jsonl_path .*no.jsonl does not exist"):
        make_reader({"vlm_sft": group})
