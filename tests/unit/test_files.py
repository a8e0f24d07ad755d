"""Rows of every kind of file, local and behind a URL: all are found, by number, and what is damaged is said."""

import io
import json
import pickle
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megabagel.config.datasets import DatasetPaths, GroupConfig, load_dataset_groups
from megabagel.data.faults import DataError, DataFault
from megabagel.data.files import jsonl, open_rows, storage
from megabagel.data.files.json_array import scan as scan_array
from megabagel.data.files.parquet import WINDOW
from tests.unit.data_fixtures import png

ROWS = [{"text": f'row {n} {"é" * n} "]}},[{{'} for n in range(7)]


def json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def json_list(rows: list[dict]) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def json_nested(rows: list[dict]) -> bytes:
    return b"\xef\xbb\xbf" + json.dumps({"v": {"a": [1]}, "rows": rows, "z": None}, ensure_ascii=False).encode()


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=2)
    return buffer.getvalue()


def tar(members: list[tuple[str, bytes]], **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def webdataset(rows: list[dict]) -> bytes:
    return tar([(f"{n:04d}.json", json.dumps(row).encode()) for n, row in enumerate(rows)])


KINDS = {
    "a.jsonl": (json_lines, "line 3"),
    "a.json": (json_list, "element 2"),
    "b.json": (json_nested, "element 2"),
    "a.parquet": (parquet, "row 2"),
    "a.tar": (webdataset, "sample 0002"),
}


def group(path, format: str = "text", **fields) -> GroupConfig:
    return GroupConfig({"one": DatasetPaths(path=str(path), data_dir="/data")}, format=format, **fields)


def all_rows(rows) -> list[dict]:
    return [rows[n] for n in range(sum(rows.blocks))]


@pytest.fixture
def memory():
    """An empty remote store, memory://."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("remote", [False, True])
def test_every_kind_of_file_gives_its_rows_by_number(name, remote, tmp_path, memory):
    write, label = KINDS[name]
    path = f"memory://bucket/{name}" if remote else str(tmp_path / name)
    with fsspec.open(path, "wb") as file:
        file.write(write(ROWS))
    rows = open_rows(group(path))
    assert all_rows(rows) == ROWS and rows.faults == []
    assert rows[5] == ROWS[5] and rows.origin(2) == f"{path} {label}" and rows.folder(2) == "/data"
    assert (rows.blocks, rows.window) == (([2, 2, 2, 1], WINDOW) if "parquet" in name else ([7], None))
    assert all_rows(pickle.loads(pickle.dumps(rows))) == ROWS  # as worker processes get it


@pytest.mark.parametrize("place", ["folder", "folder/*.jsonl", "*/?.jsonl", "**/*.jsonl"])
@pytest.mark.parametrize("remote", [False, True])
def test_a_folder_or_a_pattern_names_several_files(place, remote, tmp_path, memory):
    root = "memory://bucket" if remote else str(tmp_path)
    if not remote:
        (tmp_path / "folder").mkdir()
    for i, name in enumerate(["b.jsonl", "a.jsonl", "note.md", "picture.png"]):
        with fsspec.open(f"{root}/folder/{name}", "wb") as file:
            file.write(json_lines(ROWS[i : i + 2]))
    rows = open_rows(group(f"{root}/{place}"))
    assert all_rows(rows) == ROWS[1:3] + ROWS[:2]
    assert rows.blocks == [4] and rows.origin(2) == f"{root}/folder/b.jsonl line 1"


def test_used_rows_are_chosen_over_all_files_of_a_data_set(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(ROWS))
    rows = open_rows(group(tmp_path, num_used_data=[9]))
    assert all_rows(rows) == ROWS + ROWS[:2] and rows.origin(8) == f"{tmp_path}/b.jsonl line 2"
    rows = open_rows(group(tmp_path, num_used_data=[9], shuffle_lines=True))
    origins = {rows.origin(n) for n in range(9)}
    assert rows.blocks == [9] and len(origins) == 9 and origins != {rows.origin(n) for n in range(7)}
    assert len(all_rows(open_rows(group(tmp_path, num_used_data=[99])))) == 14


def test_files_of_other_kinds_beside_parquet_are_shuffled_in_small_blocks(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet(ROWS))
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"text": str(n)} for n in range(600)]))
    both = group(tmp_path / "a.parquet")
    both.datasets["two"] = DatasetPaths(path=str(tmp_path / "a.jsonl"))
    rows = open_rows(both)
    assert rows.blocks == [2, 2, 2, 1, 256, 256, 88] and rows.window == WINDOW
    assert rows[6 + 600] == {"text": "599"}


def test_only_the_columns_of_a_format_are_read(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet([{"text": "x", "image": b"y", "other": 1}]))
    assert open_rows(group(tmp_path), ["text", "prompt"], ["text"])[0] == {"text": "x"}
    rows = open_rows(group(tmp_path), ["text", "prompt"], ["prompt"])
    assert rows.blocks == [] and [fault.kind for fault in rows.faults] == ["missing_column"]
    assert "column prompt is missing (found image, other, text)" in str(rows.faults[0])
    rows = open_rows(group(tmp_path), ["prompt", "response"])
    assert rows.blocks == [] and "none of the columns prompt, response is there" in str(rows.faults[0])


# --- webdataset


def test_members_of_a_tar_are_rows_by_the_name_before_the_first_dot(tmp_path):
    members = [
        ("s/1.JPG", b"jpg"), ("s/1.txt", "é".encode()), ("s/2.png", b"png"), ("s/1.json", b'{"prompt": "p"}'),
        ("t/1.input.png", b"in"), ("t/1.json", b'{"text": "from json"}'), ("t/1.txt", b"from txt"), ("README", b"none"),
        ("s/2.cls", b"3"), (".hidden", b"x"), ("s/" + "long" * 60 + ".txt", b"long"),
    ]  # fmt: skip
    for options in ({"format": tarfile.GNU_FORMAT}, {"format": tarfile.PAX_FORMAT}):
        (tmp_path / "a.tar").write_bytes(tar(members, **options))
        rows = open_rows(group(tmp_path))
        assert all_rows(rows) == [
            {"jpg": b"jpg", "image": b"jpg", "text": "é", "prompt": "p"},
            {"png": b"png", "image": b"png", "cls": b"3"},
            {"input.png": b"in", "text": "from json"},
            {"text": "long"},
        ]
        assert rows.origin(2) == f"{tmp_path}/a.tar sample t/1" and rows.faults == []


def test_a_damaged_tar_keeps_what_comes_before_the_damage_and_says_so(tmp_path):
    whole = tar([(f"{n}.txt", b"x" * 700) for n in range(5)])
    begin = 2 * (512 + 1024)  # of the third member's header
    broken = {
        "cut in a member": whole[: begin + 800],
        "cut in a header": whole[: begin + 100],
        "bad header": whole[:begin] + b"\xff" * 512 + whole[begin + 512 :],
        "negative size": whole[: begin + 124] + b"\xff" * 12 + whole[begin + 136 :],
        "huge size": whole[: begin + 124] + b"\x80" + b"\x7f" * 11 + whole[begin + 136 :],
    }
    for what, data in broken.items():
        (tmp_path / "a.tar").write_bytes(data)
        rows = open_rows(group(tmp_path))
        assert [row["text"] for row in all_rows(rows)] == ["x" * 700] * 2, what
        assert sum(rows.blocks) == 2 and [fault.kind for fault in rows.faults] == ["unreadable_tar"], what
    for data in (b"", b"no tar at all" * 99):
        (tmp_path / "a.tar").write_bytes(data)
        rows = open_rows(group(tmp_path))
        assert sum(rows.blocks) == 0 and len(rows.faults) == 1


def test_a_tar_without_an_end_mark_is_whole(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar([("1.txt", b"x" * 512)])[:1024])
    rows = open_rows(group(tmp_path))
    assert all_rows(rows) == [{"text": "x" * 512}] and rows.faults == []


def test_links_in_a_tar_are_not_followed(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        link = tarfile.TarInfo("1.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    rows = open_rows(group(tmp_path))
    assert sum(rows.blocks) == 0 and "1.txt: is not a regular file" in str(rows.faults[0])


# --- damage


@pytest.mark.parametrize(
    ("content", "good", "message"),
    [
        (b'[{"a": 1}, {"a": 2}, {"a": ', 2, "all elements from number 2 on are lost"),
        (b'[{"a": 1} {"a": 2}]', 1, "',' or ']' is expected at byte 10"),
        (b"", 0, "all its rows are lost"),
        (b"3", 0, "a list, or an object with one list inside, is expected"),
        (b'{"a": [], "b": []}', 0, "found 2 lists"),
        (b'{"a": 1}', 0, "found 0 lists"),
        (b'{"a"; [1]}', 0, "':' is expected at byte 4"),
        (b"[" * 100_000, 0, "not a valid JSON list of objects"),
        (b'{"a": [{}', 0, "not a valid JSON list"),
        (b"\xff\xfe[\x00", 0, "is expected"),
    ],
)
def test_a_damaged_json_file_keeps_what_comes_before_the_damage(content, good, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    spans, faults = scan_array(str(tmp_path / "a.json"))
    assert len(spans) == good and len(faults) == 1 and message in str(faults[0])


@pytest.mark.parametrize(
    ("element", "message"),
    [(b"3", "a JSON object is expected, found int"), (b'{"a": "\xff"}', "not valid JSON"), (b"[]", "found list")],
)
def test_an_element_that_is_no_object_is_a_bad_row_of_its_own(element, message, tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"a": 1}, ' + element + b', {"a": 2}]')
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + element + b'\n{"a": 2}')
    for name in ("a.json", "a.jsonl"):
        rows = open_rows(group(tmp_path / name))
        assert (rows[0], rows[2]) == ({"a": 1}, {"a": 2})
        with pytest.raises(DataFault, match=message) as fault:
            rows[1]
        assert fault.value.kind == "broken_json"


def test_blank_lines_do_not_count_whatever_ends_them(tmp_path, monkeypatch):
    for chunk in (1, 2, 3, 1 << 24):
        monkeypatch.setattr(jsonl, "_CHUNK", chunk)
        (tmp_path / "a.jsonl").write_bytes(b'\n{"a": 1}\r\n\r\n\n7\r\n8\n{"a": 2}\r\n\r\n')
        rows = open_rows(group(tmp_path))
        assert [rows.origin(n).split()[-1] for n in range(sum(rows.blocks))] == ["2", "5", "6", "7"]
        assert (rows[0], rows[3]) == ({"a": 1}, {"a": 2})


def test_deeply_nested_lines_are_bad_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a":' * 100_000 + b"\n{}")
    with pytest.raises(DataFault, match="not valid JSON"):
        open_rows(group(tmp_path))[0]


def test_a_file_that_vanishes_or_shrinks_makes_bad_rows(tmp_path):
    for name, (write, _) in KINDS.items():
        path = tmp_path / name
        path.write_bytes(write(ROWS))
        rows = open_rows(group(path))
        path.unlink()
        with pytest.raises(DataFault) as fault:
            rows[6]
        assert fault.value.kind == "missing_file"
        path.write_bytes(write(ROWS)[:10])
        with pytest.raises(DataFault) as fault:
            rows[6]
        assert fault.value.kind in ("broken_json", "unreadable_parquet")


# --- what is said about paths


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("gone", "data set one: folder path .*gone does not exist."),
        ("gone.jsonl", "data set one: file path .*gone.jsonl does not exist."),
        ("*.tar", r"data set one: no .json, .jsonl, .parquet, .tar file matches path .*\*.tar."),
        ("empty", r"data set one: folder path .*empty holds no \*.json, \*.jsonl, \*.parquet, \*.tar file."),
        (
            "mixed",
            r"mixed holds .json, .jsonl files; name the ones to read with a pattern, for example .*mixed/\*.json",
        ),
        ("a.csv", r"path .*a.csv must be one of .json, .jsonl, .parquet, .tar, or a folder of them."),
    ],
)
@pytest.mark.parametrize("remote", [False, True])
def test_paths_that_cannot_be_used_are_refused_in_one_sentence(place, message, remote, tmp_path, memory):
    root = "memory://bucket" if remote else str(tmp_path)
    for name in ("empty/x.png", "mixed/a.json", "mixed/a.jsonl", "a.csv"):
        with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
            file.write(b"[]")
    with pytest.raises(DataError, match=message):
        open_rows(group(f"{root}/{place}"))


def test_an_unknown_protocol_is_named():
    with pytest.raises(DataError, match="nosuch://x.jsonl cannot be read .*; install the fsspec package of nosuch://"):
        open_rows(group("nosuch://x.jsonl"))


def test_what_jsonl_path_names_is_lines_whatever_it_is_called(tmp_path):
    (tmp_path / "lines.json").write_bytes(json_lines(ROWS))
    paths = DatasetPaths(jsonl_path=str(tmp_path / "lines.json"), path=str(tmp_path / "lines.json"))
    assert all_rows(open_rows(GroupConfig({"one": paths}, format="vlm_sft"))) == ROWS


def test_official_folders_may_hold_other_files_than_their_rows(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet([{"image": png(1), "captions": "{}"}]))
    (tmp_path / "info.json").write_text('{"a.parquet": {}}')
    (tmp_path / "notes.jsonl").write_text("x")
    paths = DatasetPaths(data_dir=str(tmp_path), path=str(tmp_path), parquet_info_path=str(tmp_path / "info.json"))
    rows = open_rows(GroupConfig({"one": paths}, format="t2i_pretrain"))
    assert rows.blocks == [1] and rows.faults == []


def test_a_url_that_fails_for_a_moment_is_tried_again(memory, monkeypatch):
    memory.pipe("/bucket/a.jsonl", json_lines(ROWS))
    rows = open_rows(group("memory://bucket/a.jsonl"))
    failures = iter([TimeoutError("slow"), ConnectionError("reset")])
    read = type(memory).cat_file

    def flaky(self, *arguments, **options):
        if error := next(failures, None):
            raise error
        return read(self, *arguments, **options)

    monkeypatch.setattr(type(memory), "cat_file", flaky)
    monkeypatch.setattr(storage, "_PAUSE", 0.001)
    assert rows[3] == ROWS[3]
    failures = iter([TimeoutError("slow")] * storage.ATTEMPTS)
    with pytest.raises(DataFault, match="cannot be read .*TimeoutError: slow"):
        rows[3]


@pytest.mark.parametrize(
    ("path", "folder"),
    [("rows.jsonl", "."), ("sub/v1.5", "sub/v1.5"), ("sub/*.tar", "sub"), ("sub/*/x.tar", "sub"),
     ("sub/a*/x.tar", "sub"), ("memory://b/rows.json", "memory://b"), ("memory://b/sub", "memory://b/sub")],
)  # fmt: skip
def test_names_of_pictures_count_from_the_folder_of_the_files(path, folder, tmp_path):
    (tmp_path / "data.yaml").write_text(json.dumps({"text": {"datasets": {"one": {"path": path}}}}))
    found = load_dataset_groups(str(tmp_path / "data.yaml"))["text"].datasets["one"].data_dir
    assert found == (folder if "://" in folder else str(tmp_path / folder))
