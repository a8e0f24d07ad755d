"""The demo's scores from a real, tiny model: all right where what is wanted is what the model makes, and none where the
wanted pictures are swapped."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megabagel.inference import FlowSettings, Guidance, load
from tests.unit.test_generate import CASE
from tools import demo_results
from tools.demo import answers, pictures

FLOW = FlowSettings(3, 1.0, Guidance(3.0, 1.0, (0.0, 1.0), renorm_min=1.0))
PROMPTS, INSTRUCTION, QUESTION = ["a red apple", "flag of Chad"], "make it blue", "what is it?"


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write(folder, rows: list[dict]) -> None:
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "0.parquet")


@pytest.fixture(scope="module")
def bagel():
    return load(CASE)


@pytest.mark.parametrize("swapped", [False, True])
def test_scores_of_planted_answers(tmp_path, monkeypatch, bagel, swapped):
    monkeypatch.setattr(pictures, "T2I_FLOW", FLOW)
    monkeypatch.setattr(pictures, "EDIT_FLOW", FLOW)
    monkeypatch.setattr(pictures, "DRAWS", 1)  # a planted picture is that of one noise
    side = bagel.sizes.latent.max_image_size
    sources = [Image.new("RGB", (side, side), colour) for colour in ("orange", "purple")]
    made = [png(drawn.image) for drawn in bagel.pictures(PROMPTS, FLOW)]
    edited = [png(drawn.image) for drawn in bagel.pictures([[source, INSTRUCTION] for source in sources], FLOW)]
    vlm = tmp_path / "vlm"
    (vlm / "images").mkdir(parents=True)
    sources[0].save(vlm / "images" / "0.png")
    said = answers.ask(bagel, [answers.Question("0.png", QUESTION, "")], vlm / "images")[0]
    if swapped:
        made, edited, said = made[::-1], edited[::-1], f"not {said}"
    captions = [json.dumps({"name": prompt}) for prompt in PROMPTS]
    write(tmp_path / "t2i", [{"image": i, "captions": c} for i, c in zip(made, captions, strict=True)])
    rows = zip(map(png, sources), edited, strict=True)
    write(tmp_path / "edit_val", [{"image_list": list(pair), "instruction_list": [[INSTRUCTION]]} for pair in rows])
    turns = [{"from": "human", "value": f"<image>{QUESTION}"}, {"from": "gpt", "value": said}]
    line = json.dumps({"image": "0.png", "conversations": turns}) + "\n"
    for name in ("vlm", "vlm_single_val"):
        (vlm / f"{name}.jsonl").write_text(line)
    results = demo_results.measure(bagel, tmp_path, 5, "ema", 1, tmp_path / "out" / "contact_sheet.png")
    expected = 0.0 if swapped else 1.0
    scores = results["t2i"]["accuracy"], results["edit"]["accuracy"], results["vqa"]["accuracy"]["overall"]
    assert scores == (expected, expected, expected)
    assert results["vqa"]["question_only"]["overall"] == 1.0
    assert results["t2i"]["chance"] == 0.5 and results["edit"]["chance"] == 0.25
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > side


def test_each_edit_is_drawn_from_several_noises(tmp_path, monkeypatch, bagel):
    monkeypatch.setattr(pictures, "EDIT_FLOW", FLOW)
    side = bagel.sizes.latent.max_image_size
    colours = [png(Image.new("RGB", (side, side), colour)) for colour in ("orange", "purple")]
    texts = ["make it purple", "make it orange"]
    rows = [
        {"image_list": pair, "instruction_list": [[t]]} for pair, t in zip((colours, colours[::-1]), texts, strict=True)
    ]
    write(tmp_path / "edit_val", rows)
    made = pictures.edits(bagel, tmp_path)
    assert made.prompts == [text for text in texts for _ in range(pictures.DRAWS)]
    assert len({png(image) for image in made.images}) == len(made.images) == 2 * pictures.DRAWS
