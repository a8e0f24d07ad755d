"""The demo's tools where they are pure functions: names, edits, samples, tokenizer rebuilding, PSNR, repeated runs.

No network and no packages of pictures: emojis here are made up of codes alone.
"""

import base64
import dataclasses
import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megabagel.config.autoencoder import AutoencoderConfig
from megabagel.config.datasets import load_dataset_groups
from megabagel.models.autoencoder import Autoencoder, load_autoencoder
from tools import build_qwen_tokenizer as qwen
from tools import prepare_demo as demo
from tools import train_demo_autoencoder as training
from tools.demo import captions, edits, emojis, formats, questions

TONES = list(emojis.TONES)


def emoji(code: str) -> emojis.Emoji:
    return emojis.Emoji(code, emojis.base_of(code), code, Path())


@pytest.mark.parametrize(
    ("code", "name", "plain"),
    [
        ("1F34E", ":red_apple:", "red apple"),
        ("1F1EC-1F1E9", ":Grenada:", "flag of Grenada"),
        ("1F3F4-E0067-E0062", ":England:", "flag of England"),
        ("1F44B-1F3FE", ":waving_hand_medium-dark_skin_tone:", "waving hand, medium-dark skin tone"),
        ("1F452", ":woman\u2019s_hat:", "woman's hat"),
    ],
)
def test_names_become_plain_words(code, name, plain):
    assert emojis.plain_name(code, name) == plain
    assert captions.captions_of(plain) == {"name": plain, "picture": f"a picture of {plain}"}


def test_tone_edits_need_the_neutral_form_and_all_five_tones():
    complete = ["1F44B", *(f"1F44B-{tone}" for tone in TONES)]
    incomplete = ["1F44C", *(f"1F44C-{tone}" for tone in TONES[:4])]
    found = edits.tone_edits([emoji(code) for code in complete + incomplete])
    assert [(e.source.code, e.target.code) for e in found] == [("1F44B", f"1F44B-{tone}") for tone in TONES]
    assert found[3].instructions[0] == "change the skin tone to medium-dark"
    assert len(edits.tone_edits([emoji(code) for code in complete], between_tones=True)) == 5 + 5 * 4


def test_gender_edits_change_one_person_both_ways():
    codes = ["1F3C3-200D-2642", "1F3C3-200D-2640", "1F468-200D-2695", "1F469-200D-2695", "1F468-200D-1F469-200D-1F466"]
    pairs = {(e.source.code, e.target.code) for e in edits.gender_edits([emoji(code) for code in codes])}
    assert pairs == {(codes[0], codes[1]), (codes[1], codes[0]), (codes[2], codes[3]), (codes[3], codes[2])}
    assert edits.swap_gender("1F468-200D-1F469-200D-1F466") is None


def test_variants_are_held_out_with_their_base():
    held_out = next(f"{code:X}" for code in range(0x1F400, 0x1F600) if emojis.is_held_out(f"{code:X}"))
    kept = next(f"{code:X}" for code in range(0x1F400, 0x1F600) if not emojis.is_held_out(f"{code:X}"))
    assert all(emojis.is_held_out(emoji(f"{held_out}-{tone}").base) for tone in TONES)
    assert edits.Edit(emoji(kept), emoji(f"{held_out}-{TONES[0]}"), ("x",)).held_out
    assert 0.03 < sum(emojis.is_held_out(str(code)) for code in range(4000)) / 4000 < 0.07


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_mirrored_edit_is_mirrored_on_both_sides(tmp_path, monkeypatch, mirrored):
    drawn = {"1F468": np.arange(48, dtype=np.uint8).reshape(4, 4, 3), "1F469": np.zeros((4, 4, 3), np.uint8)}
    drawn["1F469"][:, 0] = 255
    monkeypatch.setattr(edits, "render_emoji", lambda svg, side: drawn[svg])
    pair = [dataclasses.replace(emoji(code), svg=code) for code in drawn]
    count = edits.write_edits([edits.Edit(*pair, ("turn",))], tmp_path / "edit", files=4, mirrored=mirrored)
    rows = [row for file in (tmp_path / "edit").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert count == len(rows) == 1 + mirrored
    shown = [[np.asarray(Image.open(io.BytesIO(png))) for png in row["image_list"]] for row in rows]
    for step in (1, -1)[:count]:
        wanted = [picture[:, ::step] for picture in drawn.values()]
        assert any(all(map(np.array_equal, row, wanted)) for row in shown)


RED_CIRCLE = [
    ("what shape is present?", "circle"),
    ("what color is the shape?", "red"),
    ("what color is the circle?", "red"),
    ("what is the red shape?", "circle"),
    *((f"is there a {word}?", "no") for word in ("triangle", "blue shape", "rectangle", "teal shape", "green shape")),
    ("is there a red shape?", "yes"),
    ("is there not a circle?", "no"),
]


@pytest.mark.parametrize("key", [f"train {number}" for number in range(20)])
def test_every_open_question_needs_the_picture(key):
    dealt = questions.by_what_they_teach(RED_CIRCLE, key)
    answered = [pair for turns in dealt for pair in turns]
    assert len(set(answered)) == len(answered) <= len(RED_CIRCLE)
    assert {pair for pair in answered if pair[1] not in questions.YES_NO} == set(RED_CIRCLE[:4])
    for turns in dealt:
        assert [answer in questions.YES_NO for _, answer in turns].count(True) == 1
        for number, (_, answer) in enumerate(turns):
            if answer not in questions.YES_NO:
                assert not any(answer in said for pair in turns[:number] for said in pair)


def test_a_picture_without_open_questions_keeps_some_of_the_others():
    dealt = questions.by_what_they_teach(RED_CIRCLE[4:], "train 1")
    assert len(dealt) == 1 and len(dealt[0]) == 3 and set(dealt[0]) < set(RED_CIRCLE)


def test_alone_every_question_is_kept_and_the_first_turn_shows_the_picture():
    assert questions.one_by_one(RED_CIRCLE, "test 1") == [[pair] for pair in RED_CIRCLE]
    turns = questions.conversation("train/1.png", RED_CIRCLE[:3])["conversations"]
    assert [turn["value"].startswith("<image>") for turn in turns[::2]] == [True, False, False]
    assert {turn["from"] for turn in turns[1::2]} == {"gpt"}


def write_ranks(file: Path, merges: list[bytes]) -> qwen.Ranks:
    tokens = [bytes([byte]) for byte in range(256)] + merges
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return qwen.read_ranks(file)


def test_merges_are_rebuilt_from_ranks(tmp_path):
    ranks = write_ranks(tmp_path / "ranks", [b"he", b"ll", b"hell", b"hello", b" w", b" wo"])
    assert qwen.split_token(b"hello", ranks) == (b"hell", b"o")
    assert qwen.merge_bytes(b"hello", ranks) == [b"hello"]
    tokenizer = qwen.build_tokenizer(ranks)
    assert tokenizer.encode("hello wow").ids == [259, 261, ord("w")]
    assert tokenizer.encode("<|im_start|>").ids == [len(ranks) + 1]
    with pytest.raises(ValueError, match="line 1"):
        (tmp_path / "bad").write_bytes(b"no-rank\n")
        qwen.read_ranks(tmp_path / "bad")


def test_reduced_tokenizer_cuts_its_texts_like_the_whole_one_and_still_reads_others(tmp_path):
    ranks = write_ranks(tmp_path / "ranks", [b"he", b"ll", b"hell", b"hello", b" w", b" wo", b"xy"])
    whole, reduced = (qwen.build_tokenizer(ranks, kept) for kept in (None, qwen.reduce_ranks(ranks, ["hello w"])))
    assert reduced.encode("hello w").tokens == whole.encode("hello w").tokens
    assert reduced.get_vocab_size() == 256 + 5 + 22
    assert sorted(reduced.get_vocab().values()) == list(range(256 + 5 + 22))
    assert reduced.decode(reduced.encode("xy h\u00e9").ids) == "xy h\u00e9"
    assert qwen.write_folder(reduced, tmp_path / "out") == 283 and qwen.padded_size(283) == 384


def test_parquet_rows_are_dealt_over_files_and_groups_counted(tmp_path):
    import pyarrow as pa

    rows = [{"captions": str(index)} for index in range(150)]
    groups = formats.write_parquet(rows, pa.schema([("captions", pa.string())]), tmp_path / "t2i", files=2)
    assert groups == {"00000.parquet": 2, "00001.parquet": 2}
    read = [row["captions"] for name in groups for row in pq.read_table(tmp_path / "t2i" / name).to_pylist()]
    assert sorted(read, key=int) == [row["captions"] for row in rows]


@pytest.mark.parametrize("val", [False, True])
def test_data_yaml_is_what_the_trainer_reads(tmp_path, val):
    counts = {name + split: 10 for name in ("t2i", "edit", "vlm") for split in ("", "_val")}
    formats.write_data_yaml(formats.data_config(counts, val), tmp_path / "data.yaml", "note")
    assert "&id" not in (tmp_path / "data.yaml").read_text()
    groups = load_dataset_groups(str(tmp_path / "data.yaml"))
    assert list(groups) == ["t2i_pretrain", "unified_edit", "vlm_sft"]
    assert groups["unified_edit"].datasets["emoji_edits"].data_dir == str(tmp_path / ("edit_val" if val else "edit"))


def test_a_second_run_returns_at_once_and_foreign_folders_are_left_alone(tmp_path, monkeypatch):
    runs = []

    def fill(folder, options):
        runs.append(options)
        (folder / "a.txt").write_text("a")
        manifest = {"hash": demo.options_hash(options), "samples": {}, "files": demo.listing(folder)}
        formats.write_json(manifest, folder / demo.MANIFEST)
        return manifest

    monkeypatch.setattr(demo, "fill", fill)
    monkeypatch.setattr(demo, "fetch_packages", lambda cache: None)
    out = tmp_path / "demo"
    first = demo.prepare(out, tmp_path, demo.Options())
    assert demo.prepare(out, tmp_path, demo.Options()) == first and len(runs) == 1
    demo.prepare(out, tmp_path, demo.Options(vlm_images=1))
    (out / "a.txt").unlink()
    demo.prepare(out, tmp_path, demo.Options(vlm_images=1))
    assert len(runs) == 3 and sorted(path.name for path in tmp_path.iterdir()) == ["demo"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("")
    with pytest.raises(SystemExit, match="did not write"):
        demo.prepare(tmp_path / "mine", tmp_path, demo.Options())


def test_psnr_of_a_known_error():
    images = torch.zeros(2, 3, 8, 8)
    assert training.psnr(images + 0.2, images).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)


def test_folding_the_latent_scale_keeps_the_decoded_picture(tmp_path):
    torch.manual_seed(0)
    config = AutoencoderConfig(64, ch=8, ch_mult=(1, 1), downsample=2, num_res_blocks=1, num_groups=4, z_channels=4)
    model = Autoencoder(AutoencoderConfig(**{**vars(config), "scale_factor": 1.0, "shift_factor": 0.0}))
    pictures = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    images, noise = training.normalise(pictures), torch.randn(8, 4, 8, 8)
    with torch.no_grad():
        before = model.decode(model.sample(model.encode_moments(images), noise))
        training.fold_latent_scale(model, pictures)
        latent = model.sample(model.encode_moments(images), noise)
        assert torch.allclose(model.decode(latent), before, atol=1e-4)
    assert abs(latent.mean().item()) < 0.05 and abs(latent.var().item() - 1.0) < 0.1
    training.save(model, tmp_path)
    assert load_autoencoder(tmp_path).config == model.config
    assert load_file(tmp_path / "ae.safetensors")["decoder.conv_in.weight"].dtype == torch.float16
    assert json.loads((tmp_path / "ae_params.json").read_text())["num_groups"] == 4
