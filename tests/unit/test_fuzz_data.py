"""2,000 mutated pictures, rows and files on their way to pixels: no crash or hang, bounded memory, each counted."""

import io
import json
import tarfile
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megabagel.config.datasets import DatasetPaths, GroupConfig, load_dataset_groups
from megabagel.config.schema import DataConfig
from megabagel.data.document import Entry, ImageSource
from megabagel.data.faults import DataFault
from megabagel.data.images import FORMATS
from megabagel.data.prepare import Preparer
from megabagel.data.sources import open_source
from megabagel.data.text import Tokenizer
from megabagel.packing.geometry import Geometry
from tests.unit.data_fixtures import TOKENIZER, TRANSFORM, VIT_TRANSFORM, edit_rows, png, t2i_rows
from tests.unit.hostile import lay_traps, mutated_bytes, mutated_line, mutated_value, png_with

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
TOKENS = Tokenizer(TOKENIZER)
LIMIT_S, LIMIT_BYTES = 10, 1 << 30  # for one row; above the start
KINDS = {
    *("bad_row", "broken_json", "missing_file", "path_outside", "unreadable_file", "undecodable_image", "image_bomb"),
    *("over_long", "unreadable_parquet", "video_container", "undecodable_video", "nan_pixels"),
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


@pytest.fixture(autouse=True)
def bounded_memory():
    """The peak of the resident memory during the test, measured by the kernel."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = resident_peak()
    yield
    print(f"{(resident_peak() - before) >> 20} MiB above the start")
    assert resident_peak() - before < LIMIT_BYTES


def resident_peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def preparer(group: GroupConfig) -> Preparer:
    config = DataConfig(max_num_tokens_per_sample=400)
    return Preparer({"g": group}, config, TOKENS, Geometry(16, 8, 14, 8, TOKENS.special))


def pairs(**paths) -> GroupConfig:
    return GroupConfig({"x": DatasetPaths(**paths)}, TRANSFORM, format="t2i_pretrain")


def prepared(ours: Preparer, entries, row: int, found: Counter) -> None:
    """Count what becomes of one document. Nothing but DataFault may come out."""
    begin = time.monotonic()
    try:
        entries = entries()
        planned = ours.read(ours.measure(0, entries, (0, row, 0), "x"), 0, entries)
        pixels = planned.vit_pixels + planned.vae_pixels
        assert all(p.dtype == np.uint8 and p.size for p in pixels) and 0 < planned.num_tokens <= 400
        found["accepted"] += 1
    except DataFault as fault:
        assert str(fault) and fault.kind in KINDS, (fault.kind, str(fault))
        found[fault.kind] += 1
    assert time.monotonic() - begin < LIMIT_S


def run(group: GroupConfig, name: str = "g") -> Counter:
    """All rows of a group through source and preparer."""
    source, ours, found = open_source(name, group, 1), preparer(group), Counter()
    for row in range(sum(source.blocks)):
        assert source.origin(row)
        prepared(ours, lambda row=row: source.document(row, (0, row, 0)), row, found)
    found["file"] = len(source.faults)
    assert found.total() - found["file"] == sum(source.blocks)
    return found


def test_mutated_pictures():
    draw, found, count = np.random.default_rng(0), Counter(), 0
    pixels = Image.effect_noise((37, 50), 90).convert("RGB")
    ours = preparer(pairs())
    for format in FORMATS:
        for options in ({}, {"exif": Image.Exif()}):
            buffer = io.BytesIO()
            pixels.save(buffer, format, **(options if format in ("JPEG", "PNG", "WEBP") else {}))
            for _ in range(55):
                content = mutated_bytes(buffer.getvalue(), draw)
                entries = [Entry(text="x"), Entry(image=ImageSource(0, content=content), loss=True)]
                prepared(ours, lambda entries=entries: entries, 0, found)
                count += 1
    assert found.total() == count == 990
    assert found["accepted"] > 90 and found["undecodable_image"] > 300, found


def test_bombs():
    ours, found = preparer(pairs()), Counter()
    packed = zlib.compress(bytes(64 << 20), 1)
    large = io.BytesIO()
    Image.new("L", (9000, 9000)).save(large, "PNG", compress_level=1)  # within the limit of 100 million pixels
    bombs = [
        *(png_with(size=size) for size in ((2**31 - 1, 2**31 - 1), (1, 2**31 - 1), (40000, 40000), (10**5, 1))),
        *(png_with((kind, b"a\0\0" + packed)) for kind in (b"zTXt", b"iCCP", b"tEXt")),
        png_with((b"zTXt", b"a\0\0" + zlib.compress(packed * 9))),
        large.getvalue(),
    ]
    for content in bombs:
        entries = [Entry(text="x"), Entry(image=ImageSource(0, content=content), loss=True)]
        prepared(ours, lambda entries=entries: entries, 0, found)
    assert found["accepted"] <= 3 and found["image_bomb"] >= 5 and found.total() == len(bombs), found


def test_mutated_rows_of_every_json_format(tmp_path):
    draw, total = np.random.default_rng(1), Counter()
    lay_traps(tmp_path)
    for file in (EXAMPLES / "pictures").rglob("*.png"):
        target = tmp_path / file.relative_to(EXAMPLES / "pictures")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    names = [n for n, g in load_dataset_groups(str(EXAMPLES / "data.yaml")).items() if rows_of(n)]
    assert len(names) == 11
    for name in names:
        group, rows = load_dataset_groups(str(EXAMPLES / "data.yaml"))[name], rows_of(name)
        lines = [mutated_line(rows[i % len(rows)], draw) for i in range(70)]
        file = tmp_path / f"{name}.jsonl"
        file.write_bytes(b"\n".join(lines))
        group.datasets = {"x": DatasetPaths(path=str(file), data_dir=str(tmp_path))}
        found = run(group, name)
        assert found.total() == sum(bool(line.strip()) for line in lines), name
        total += found
    assert total.total() >= 770 - 11 and total["accepted"] > 60, total
    assert all(total[kind] for kind in ("bad_row", "broken_json", "missing_file", "path_outside")), total


def rows_of(name: str) -> list[dict]:
    """The example rows of a format that is written as JSON."""
    for file in (EXAMPLES / name).glob("rows.json*"):
        text = file.read_text()
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines()]
        content = json.loads(text)
        return content if isinstance(content, list) else content["data"]
    return []


def test_mutated_parquet_rows_and_files(tmp_path):
    draw = np.random.default_rng(2)
    for name, rows in (("t2i_pretrain", t2i_rows(range(60))), ("unified_edit", edit_rows(range(60)))):
        folder = tmp_path / name
        folder.mkdir()
        group = GroupConfig(
            {"x": DatasetPaths(data_dir=str(folder), path=str(folder))},
            TRANSFORM,
            format=name,
            vit_image_transform_args=VIT_TRANSFORM,
        )
        rows += [with_a_fault(row, draw) for row in rows]
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        found = run(group)
        assert found.total() == 120 and found["file"] == 0 and 60 <= found["accepted"] < 90, found
        whole = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows[:3]), whole)
        for n in range(40):
            (folder / f"{n}.parquet").write_bytes(mutated_bytes(whole.getvalue(), draw))
        found = run(group)
        assert found["file"] + found["unreadable_parquet"] > 10, found
        source = open_source("g", group, 1)
        seen = {source.origin(row).split(" row ")[0] for row in range(sum(source.blocks))}
        seen |= {fault.origin for fault in source.faults}
        assert {str(file) for file in folder.iterdir()} == seen


def with_a_fault(row: dict, draw: np.random.Generator) -> dict:
    """A row of the same column types with a null, an empty list, a broken picture or broken JSON in one column."""
    key = list(row)[int(draw.integers(0, len(row)))]
    value = row[key]
    if isinstance(value, bytes):
        wrong = [None, b"", mutated_bytes(value, draw)]
    elif isinstance(value, str):
        wrong = [None, "", "[]", "7", json.dumps(mutated_value(json.loads(value), draw)).replace("\\ud800", "")]
    else:
        wrong = [None, [], value[1:], [None, *value[1:]], [*value, value[0]]]
    return {**row, key: wrong[int(draw.integers(0, len(wrong)))]}


def test_mutated_tar_members_and_files(tmp_path):
    draw = np.random.default_rng(3)
    group = GroupConfig(
        {"x": DatasetPaths(path=str(tmp_path), data_dir=str(tmp_path))}, VIT_TRANSFORM, format="image_to_text"
    )
    members = []
    for n in range(160):
        text, picture = f"text {n}".encode(), png(n)
        if n % 2:
            text = mutated_bytes(text, draw)
        else:
            picture = mutated_bytes(picture, draw)
        members += [(f"{n}.txt", text), (f"{n}.png", picture)]
    (tmp_path / "rows.tar").write_bytes(archive(members))
    found = run(group)
    assert found.total() == 160 and found["accepted"] > 20 and found["undecodable_image"] > 20, found
    whole = archive(members[:6])
    for n in range(40):
        (tmp_path / f"{n}.tar").write_bytes(mutated_bytes(whole[:4096], draw) + whole[4096:])
    found = run(group)
    assert found["file"] > 10 and found.total() > 200, found


def archive(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
