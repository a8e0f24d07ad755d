"""The index beside a data file: what it says, that it changes nothing but the time, and when it is not used."""

import json
import logging
import os
import shutil
import sys
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from megabagel.config.datasets import load_dataset_groups
from megabagel.data import prepare
from megabagel.data.faults import Fault
from megabagel.data.files import index, json_array, jsonl, webdataset
from megabagel.data.loader import SampleMaker
from megabagel.data.prepare import Preparer
from megabagel.data.sources import open_source
from megabagel.data.text import Tokenizer
from megabagel.packing.geometry import Geometry
from tests.tiny_data import CHECKPOINT
from tests.unit.data_fixtures import data_config

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools")]

from index_data import main  # noqa: E402

TOKENIZER = str(CHECKPOINT)


@pytest.fixture
def examples(tmp_path) -> Path:
    """A copy of one group of every format."""
    shutil.copytree(ROOT / "examples" / "data", tmp_path / "data")
    return tmp_path / "data"


def make_maker(data: Path) -> SampleMaker:
    groups = load_dataset_groups(str(data))
    tokenizer = Tokenizer(TOKENIZER)
    config = data_config(max_num_tokens=400, max_num_tokens_per_sample=400)
    return SampleMaker(groups, Preparer(groups, config, tokenizer, Geometry(16, 8, 14, 8, tokenizer.special)), 0)


def measured(maker: SampleMaker) -> list:
    """Two passes over all groups, as plain values."""
    found = []
    for group, order in enumerate(maker.orders):
        for position in range(2 * order.num_rows):
            sample = maker.measure(group, position)
            assert not isinstance(sample, Fault), sample
            pieces = [(p.kind, p.grid, None if p.text_ids is None else p.text_ids.tolist()) for p in sample.pieces]
            found.append((sample.key, sample.origin, pieces))
    return found


def forbidden(*arguments):
    raise AssertionError("the index should have spared this")


def test_with_an_index_no_file_is_scanned_no_picture_opened_and_every_sample_is_the_same(examples, monkeypatch):
    expected = measured(make_maker(examples / "data.yaml"))
    assert main([str(examples / "data.yaml"), "--tokenizer", TOKENIZER]) == 0
    for module in (jsonl, json_array, webdataset):
        monkeypatch.setattr(module, "scan", forbidden)
    monkeypatch.setattr(prepare, "header_size", forbidden)
    maker = make_maker(examples / "data.yaml")
    assert measured(maker) == expected
    for group, order in enumerate(maker.orders):
        assert not isinstance(maker.load(group, order.num_rows - 1), Fault)


def test_the_index_tells_lengths_sizes_and_faults(examples, capsys):
    rows = examples / "text_to_image" / "rows.json"
    good = json.loads(rows.read_text())
    missing = {**good[0], "image_path": "none.png"}
    rows.write_text(json.dumps([*good, missing, {"text_prompt": 3}]))
    assert main([str(examples / "data.yaml"), "--tokenizer", TOKENIZER]) == 0
    assert "rows.json: 4 rows, 2 bad" in capsys.readouterr().out
    table = pq.read_table(f"{rows}{index.SUFFIX}").to_pylist()
    assert [row["tokens"] for row in table[:2]] == [[len(Tokenizer(TOKENIZER).encode(r["text_prompt"]))] for r in good]
    assert all(row["width"] and row["height"] and row["fault"] is None for row in table[:2])
    assert [row["fault"] for row in table[2:]] == ["missing_file", "bad_row"]
    content = rows.read_bytes()
    assert [json.loads(content[row["begin"][0] : row["end"][0]]) for row in table[:3]] == [*good, missing]
    edits = pq.read_table(f"{examples}/unified_edit/00000.parquet{index.SUFFIX}").to_pylist()
    pictures = pq.read_table(examples / "unified_edit" / "00000.parquet").to_pylist()
    assert [len(row["width"]) for row in edits] == [len(row["image_list"]) for row in pictures]


def test_files_with_a_current_index_are_skipped_and_others_done(examples, capsys):
    command = [str(examples / "data.yaml"), "--tokenizer", TOKENIZER]
    main(command)
    changed = examples / "text" / "rows.jsonl"
    changed.write_text(changed.read_text() + '{"text": "one more"}\n')
    capsys.readouterr()
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "15 files, 14 have a current index" in output and output.count(" rows, ") == 1
    assert f"{changed}: 3 rows" in output
    assert main(command[:1]) == 0  # without a tokenizer: other contents
    assert "0 have a current index" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["older", "cut off", "flipped"])
def test_an_index_that_cannot_be_trusted_is_ignored_with_one_warning(examples, damage, caplog):
    main([str(examples / "data.yaml")])
    group = load_dataset_groups(str(examples / "data.yaml"))["image_to_text"]
    for file in (examples / "image_to_text").glob(f"*{index.SUFFIX}"):
        if damage == "older":
            data = str(file).removesuffix(index.SUFFIX)
            os.utime(data, ns=(1, 1))
        else:
            content = bytearray(file.read_bytes())
            content[60:90] = bytes(30)
            file.write_bytes(content if damage == "flipped" else content[:-200])
    with caplog.at_level(logging.WARNING):
        source = open_source("image_to_text", group, 0)
    assert len(source.document(0, (0, 0, 0))) > 1 and sum(source.blocks) == 4
    assert len(caplog.records) == 1 and caplog.records[0].message.startswith("2 of the data's indexes")
    assert all(file.index is None for file in source.files)


def test_an_index_made_for_another_format_gives_places_but_no_sizes(examples):
    main([str(examples / "data.yaml")])
    file, stale = str(examples / "sequence" / "rows.jsonl"), []
    same, other = (index.open_index(file, None, name, stale) for name in ("sequence", "interleaved"))
    assert same.sizes(0) and not other.sizes(0) and not stale
    assert (same.places.spans == other.places.spans).all()


def test_indexes_of_files_with_one_name_share_a_folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(json.dumps({"text": f"in {name}"}) + "\n")
    transform = {"image_stride": 14, "max_image_size": 56, "min_image_size": 28}
    paths = {name: {"path": f"{name}/rows.jsonl"} for name in ("a", "b")}
    group = {"datasets": paths, "image_transform_args": transform, "index_dir": "indexes"}
    (tmp_path / "data.yaml").write_text(json.dumps({"text": group}))
    assert main([str(tmp_path / "data.yaml"), "--out", str(tmp_path / "indexes")]) == 0
    assert len(list((tmp_path / "indexes").iterdir())) == 2
    source = open_source("text", load_dataset_groups(str(tmp_path / "data.yaml"))["text"], 0)
    assert [source.document(row, (0, row, 0))[0].text for row in range(2)] == ["in a", "in b"]
    assert all(file.index is not None for file in source.files)


def test_remote_files_are_indexed_into_a_folder(tmp_path, capsys, monkeypatch):
    folder = fsspec.filesystem("memory")
    folder.pipe("/remote/rows.jsonl", b'{"text": "far away"}\n\n{"text": "and here"}\n')
    transform = {"image_stride": 14, "max_image_size": 56, "min_image_size": 28}
    group = {"datasets": {"one": {"path": "memory://remote/*.jsonl"}}, "image_transform_args": transform}
    (tmp_path / "data.yaml").write_text(json.dumps({"text": group}))
    assert main([str(tmp_path / "data.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--out" in error
    assert main([str(tmp_path / "data.yaml"), "--out", str(tmp_path)]) == 0
    (tmp_path / "data.yaml").write_text(json.dumps({"text": {**group, "index_dir": "."}}))
    monkeypatch.setattr(jsonl, "scan", forbidden)
    source = open_source("text", load_dataset_groups(str(tmp_path / "data.yaml"))["text"], 0)
    assert source.document(1, (0, 1, 0))[0].text == "and here" and source.origin(1).endswith("line 3")
    folder.rm("/remote", recursive=True)
