"""Stored pictures: what is written is found again, what is unfinished or made of something else is not used."""

import fcntl
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from megabagel.config.datasets import load_dataset_groups
from megabagel.config.load import load_config
from megabagel.config.schema import Config
from megabagel.data.faults import DataError, DataFault
from megabagel.data.prepare import Preparer
from megabagel.data.sources import open_source
from megabagel.data.stored import Header, StoredLatents, finished, rows_of
from megabagel.data.stored_writer import PartWriter, count_pictures, faults_in, prepare_folder
from megabagel.data.text import Tokenizer
from megabagel.models.autoencoder import load_autoencoder
from megabagel.packing.geometry import geometry_of
from megabagel.training.encode_latents import moments_of
from megabagel.training.encode_vision import features_of
from megabagel.training.stored import check_stored, fingerprint
from tests.tiny_data import CHECKPOINT, write_data
from tools import encode_latents
from tools.latents.encode import load_tower

ROWS = 6
VAE, VIT = "vae_image", "vit_image"


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), rows=ROWS)


def options(data_file: Path) -> list[str]:
    settings = {
        "model.folder": CHECKPOINT,
        "checkpoint.init_from": CHECKPOINT,
        "data.dataset_config_file": data_file,
        "training.params_dtype": "fp32",
        "model.freeze_vit": "true",
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def encode(data_file: Path, out: Path, *extra: str) -> int:
    return encode_latents.main([f"--out={out}", "--vit", *options(data_file), *extra])


@pytest.fixture(scope="module")
def stored(data_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("latents")
    assert encode(data_file, out) == 0
    return out


def opened(data_file: Path, out: Path, group: str, features: bool = True) -> StoredLatents:
    config = replace(load_dataset_groups(str(data_file))[group], latents_dir=str(out / group))
    return StoredLatents.open(config, features=features)


def header_for(data_file: Path, group: str = "t2i_pretrain", dtype: str = "fp32") -> Header:
    config = load_dataset_groups(str(data_file))[group]
    return Header(VAE, "some weights", dtype, vars(config.image_transform_args), rows_of(config))


def write(folder: Path, header: Header, rows: range, shard_bytes: int = 1 << 20, stop: int | None = None) -> None:
    """One picture of 32 x 16 a row, full of its row's number."""
    prepare_folder(folder, header)
    writer = PartWriter(folder, "t2i_pretrain", VAE, rows.start, shard_bytes)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[header.dtype]
    for row in rows:
        writer.add(row, 0, (64, 40), (32, 16), torch.full((4, 4, 2), float(row), dtype=dtype))
        writer.end_row(row)
    writer.close(rows.stop if stop is None else stop)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_written_in_parts_is_found_by_row_number_and_size(data_file, tmp_path, dtype):
    write(tmp_path / "t2i_pretrain" / VAE, header_for(data_file, dtype=dtype), range(2, 6), shard_bytes=150)
    assert len(finished(tmp_path / "t2i_pretrain" / VAE)) > 1
    known = pickle.loads(pickle.dumps(opened(data_file, tmp_path, "t2i_pretrain")))
    for row in range(2, 6):
        assert known.size(row, 0) == (40, 64)
        found = known.lookup(row, 0, VAE, (32, 16))
        values = torch.from_numpy(found).view(torch.bfloat16) if dtype == "bf16" else torch.from_numpy(found)
        assert values.element_size() == {"fp32": 4, "bf16": 2}[dtype]
        assert torch.equal(values.float(), torch.full((4, 4, 2), float(row)))
    assert known.bytes_per_pixel(VAE) == 4 * 4 * 2 * {"fp32": 4, "bf16": 2}[dtype] / (32 * 16)
    assert known.bytes_per_pixel(VIT) == 0
    assert known.lookup(3, 0, VAE, (16, 32)) is None  # not stored at that size
    assert known.lookup(3, 1, VAE, (32, 16)) is None and known.size(3, 1) is None
    assert known.lookup(1, 0, VAE, (32, 16)) is None and known.size(6, 0) is None
    assert known.lookup(3, 0, VIT, (32, 16)) is None


def test_rows_that_were_not_finished_and_files_of_a_killed_run_are_dropped(data_file, tmp_path):
    folder = tmp_path / "t2i_pretrain" / VAE
    write(folder, header_for(data_file), range(0, 4), stop=3)
    (folder / "0000000003-0000000004.safetensors").write_bytes(b"no index follows")
    (folder / "0000000003-0000000004.parquet.unfinished").write_bytes(b"half")
    write(folder, header_for(data_file), range(3, 4))
    assert finished(folder) == [(0, 3), (3, 4)]
    assert count_pictures(folder) == 4 and len(list(folder.iterdir())) == 5
    assert opened(data_file, tmp_path, "t2i_pretrain").lookup(3, 0, VAE, (32, 16))[0, 0, 0] == 3


def test_a_damaged_shard_is_a_fault_of_the_row(data_file, tmp_path):
    folder = tmp_path / "t2i_pretrain" / VAE
    write(folder, header_for(data_file), range(1))
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(DataFault, match="cannot be read"):
        opened(data_file, tmp_path, "t2i_pretrain").lookup(0, 0, VAE, (32, 16))


def test_pictures_stored_at_other_sizes_or_from_other_rows_are_refused(data_file, tmp_path, caplog):
    folder, header = tmp_path / "t2i_pretrain" / VAE, header_for(data_file)
    with pytest.raises(DataError, match="holds no stored pictures"):
        opened(data_file, tmp_path, "t2i_pretrain")
    cases = [
        (replace(header, transform={**header.transform, "max_image_size": 128}), "'max_image_size': 128"),
        (replace(header, rows={**header.rows, "num_used_data": [1]}), "another choice of rows"),
        (replace(header, version=99), "version 99"),
    ]
    for other, message in cases:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "header.json").write_text(json.dumps(vars(other)))
        with pytest.raises(DataError, match=message):
            opened(data_file, tmp_path, "t2i_pretrain")
    (folder / "header.json").write_text("{")
    with pytest.raises(DataError, match="not a header"):
        opened(data_file, tmp_path, "t2i_pretrain")
    files = {"tiny": {"a.parquet": [header.rows["files"]["tiny"]["a.parquet"][0], 1]}}
    (folder / "header.json").write_text(json.dumps(vars(replace(header, rows={**header.rows, "files": files}))))
    opened(data_file, tmp_path, "t2i_pretrain")
    assert "touched since" in caplog.text
    with pytest.raises(DataError, match="begun with another rows"):
        prepare_folder(folder, header)


class Encoded:
    """What the encode phase makes of a picture by itself, each one computed once."""

    def __init__(self, config: Config) -> None:
        self.autoencoder, self.tower = load_autoencoder(CHECKPOINT), load_tower(config)
        self.side = config.model.vit.max_num_patch_per_side
        self.known: dict[tuple, np.ndarray] = {}

    def __call__(self, kind: str, pixels: np.ndarray) -> np.ndarray:
        name = (kind, pixels.shape, pixels.tobytes())
        if name not in self.known:
            image, cpu = torch.from_numpy(pixels).permute(2, 0, 1), torch.device("cpu")
            rows, columns = (torch.arange(side // 14) for side in image.shape[1:])
            ids = (rows[:, None] * self.side + columns).flatten()
            (values,) = (
                moments_of(self.autoencoder, [image], cpu, torch.float32)
                if kind == VAE
                else features_of(self.tower, [image], [ids], cpu)
            )
            self.known[name] = values.numpy()
        return self.known[name]


def test_every_picture_of_every_row_is_what_the_encoders_make_of_its_pixels(data_file, stored):
    config = load_config(options(data_file))
    groups = load_dataset_groups(str(data_file))
    tokenizer = Tokenizer(str(CHECKPOINT))
    data = replace(config.data, vit_cond_dropout_prob=0.0, vae_cond_dropout_prob=0.0)
    known = [opened(data_file, stored, name) for name in groups]
    plain, fast = (
        Preparer(groups, data, tokenizer, geometry_of(config.model, tokenizer.special), known=with_known)
        for with_known in (None, known)
    )
    encoded = Encoded(config)
    for index, (name, group) in enumerate(groups.items()):
        source = open_source(name, group, config.data.seed)
        for row in range(0, ROWS, 2):
            for visit in range(2):
                key = (index, row, visit)
                entries = source.document(row, key)
                measured = fast.measure(index, entries, key, "here")
                assert [(p.kind, p.grid) for p in measured.pieces] == [
                    (p.kind, p.grid) for p in plain.measure(index, entries, key, "here").pieces
                ]
                pixels, found = plain.read(measured, index, entries), fast.read(measured, index, entries)
                for image, moments in zip(pixels.vae_pixels, found.vae_pixels, strict=True):
                    np.testing.assert_allclose(moments, encoded(VAE, image), rtol=1e-5, atol=1e-5)
                for image, features in zip(pixels.vit_pixels, found.vit_pixels, strict=True):
                    np.testing.assert_allclose(features, encoded(VIT, image), rtol=1e-5, atol=1e-5)
    assert opened(data_file, stored, "unified_edit", features=False).lookup(0, 0, VIT, (56, 56)) is None


def test_the_tool_goes_on_where_it_was_stopped_and_leaves_the_rest_alone(data_file, tmp_path, capsys):
    small = ["--group=vlm_sft", "--shard-mib=1"]
    assert encode(data_file, tmp_path, *small) == 0
    folder = tmp_path / "vlm_sft" / VIT
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert encode(data_file, tmp_path, *small) == 0
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole
    with_pictures = sum(row % 3 > 0 for row in range(ROWS))
    assert count_pictures(folder) == with_pictures
    (index,) = folder.glob("*.parquet")
    index.unlink()
    prepare_folder(folder, Header(**json.loads((folder / "header.json").read_text())))
    PartWriter(folder, "vlm_sft", VIT, 0, 1).close(3)
    assert encode(data_file, tmp_path, *small) == 0
    assert finished(folder) == [(0, 3), (3, ROWS)]
    rows = pq.read_table(folder / "0000000003-0000000006.parquet").to_pylist()
    assert [(row["group"], row["row"], row["number"], row["kind"]) for row in rows] == [
        ("vlm_sft", row, 0, VIT) for row in range(3, ROWS) if row % 3
    ]
    assert f"set latents_dir: {tmp_path / 'vlm_sft'}" in capsys.readouterr().out


def test_rows_that_cannot_be_used_are_listed(data_file, tmp_path, capsys):
    copy = write_data(tmp_path / "data", ("vlm_sft",), rows=ROWS)
    os.truncate(tmp_path / "data" / "vlm_sft" / "1.png", 60)
    assert encode(copy, tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "1 rows cannot be used" in printed.out and "max_bad_fraction = 0.05 of the rows of vlm_sft" in printed.err
    (fault,) = [json.loads(line) for line in (tmp_path / "out" / "vlm_sft" / "faults.jsonl").read_text().splitlines()]
    assert fault["row"] == 1 and fault["kind"] == "undecodable_image" and "rows.jsonl" in fault["origin"]
    assert faults_in(tmp_path / "out" / "vlm_sft" / VIT) == [fault]
    assert encode(copy, tmp_path / "out", "--data.max_bad_fraction=0.5") == 0


def test_what_the_tool_refuses_it_says_in_a_sentence(data_file, tmp_path, capsys):
    assert encode(data_file, tmp_path, "--model.freeze_vit=false") == 1
    assert "set model.freeze_vit to true" in capsys.readouterr().err
    assert encode(data_file, tmp_path, "--group=other") == 1
    assert "it has t2i_pretrain, unified_edit, vlm_sft" in capsys.readouterr().err
    with open(tmp_path / encode_latents.LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert encode(data_file, tmp_path) == 1
    assert "another encode_latents writes" in capsys.readouterr().err


def test_another_autoencoder_is_refused_and_another_precision_is_not(data_file, stored):
    groups = load_dataset_groups(str(data_file))
    groups["t2i_pretrain"].latents_dir = str(stored / "t2i_pretrain")
    autoencoder = load_autoencoder(CHECKPOINT)
    check_stored(groups, autoencoder, None)
    check_stored(groups, autoencoder.bfloat16(), None)
    before = fingerprint(autoencoder)
    with torch.no_grad():
        autoencoder.encoder.conv_in.bias[0] += 1
    assert fingerprint(autoencoder) != before
    with pytest.raises(DataError, match="another autoencoder than this run has"):
        check_stored(groups, autoencoder, None)
