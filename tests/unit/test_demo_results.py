"""The scores of the demo on answers that are known: who is nearest, who the candidates are, what a question tells."""

import json
from collections import Counter

import pytest
import torch
from PIL import Image

from tools.demo import report
from tools.demo.answers import Question, accuracies, from_the_question_alone, read_questions
from tools.demo.nearest import hits, nearest
from tools.demo.pictures import OTHERS, EditRow, Made, candidates_of


def test_the_nearest_candidate_is_found_among_each_picture_s_own():
    made = torch.tensor([[0.0, 1.0], [5.0, 5.0]])
    candidates = [torch.tensor([[0.0, 1.1], [9.0, 9.0]]), torch.tensor([[0.0, 1.1], [9.0, 9.0], [4.0, 5.0]])]
    assert [nearest(one, those) for one, those in zip(made, candidates, strict=True)] == [0, 2]
    assert hits(made, candidates, [0, 1]) == [True, False]


def edit_rows(families: int) -> list[EditRow]:
    """A neutral picture with five variants in each family, and one edit back."""
    rows = []
    for family in range(families):
        rows += [EditRow(b"%d" % family, b"%d tone %d" % (family, tone), "tone") for tone in range(5)]
    return [*rows, EditRow(b"0 tone 1", b"0", "back")]


def test_an_edit_is_told_from_its_source_all_other_variants_and_others():
    rows = edit_rows(7)
    for row, candidates in zip(rows, candidates_of(rows), strict=True):
        family = row.source.split()[0]
        assert candidates[:2] == [row.target, row.source]
        assert len(set(candidates)) == len(candidates) == 6 + OTHERS
        assert Counter(name.split()[0] == family for name in candidates) == {True: 6, False: OTHERS}
    assert candidates_of(rows) == candidates_of(rows)
    assert len(candidates_of(edit_rows(2))[0]) == 6 + 6  # fewer others than are wanted


def test_what_questions_and_yes_or_no_are_counted_apart():
    asked = [Question("0.png", text, answer) for text, answer in (("a", "red"), ("b", "yes"), ("c", "no"), ("d", "no"))]
    assert accuracies(asked, ["red", "no", "no", "no"]) == {"overall": 0.75, "what": 1.0, "yes_no": 2 / 3}
    assert accuracies(asked[:1], ["Red"]) == {"overall": 0.0, "what": 0.0}


def test_the_baseline_knows_the_question_only():
    trained = [Question("0.png", "what?", answer) for answer in ("red", "blue", "blue")]
    trained += [Question("0.png", "is it?", "no")] * 4
    asked = [Question("9.png", text, "") for text in ("what?", "is it?", "never met")]
    assert from_the_question_alone(trained, asked) == ["blue", "no", "no"]


def test_every_question_of_a_conversation_is_read(tmp_path):
    turns = [("human", "<image>what?"), ("gpt", "red"), ("human", "is it?"), ("gpt", "no")]
    sample = {"image": "test/0.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    (tmp_path / "a.jsonl").write_text(json.dumps(sample) + "\n")
    assert read_questions(tmp_path / "a.jsonl") == [
        Question("test/0.png", "what?", "red"),
        Question("test/0.png", "is it?", "no"),
    ]


@pytest.mark.parametrize(("yes_no", "said"), [(0.9, "beats its prior"), (0.8, "does not beat its prior")])
def test_the_report_says_whether_yes_and_no_beat_their_prior(tmp_path, yes_no, said):
    scored = {"count": 4, "accuracy": 0.5, "chance": 0.1, "seconds": 3.0, "how": "so"}
    accuracy = {"overall": 0.7, "what": 0.5, "yes_no": yes_no}
    vqa = scored | {"accuracy": accuracy, "question_only": {"overall": 0.6, "what": 0.2, "yes_no": 0.8}}
    edit = scored | {"of_tones": {"count": 3, "accuracy": 2 / 3, "chance": 0.1}}
    results = {"step": 7, "weights": "ema", "t2i": scored, "edit": edit, "vqa": vqa}
    summary = report.summary(results, tmp_path)
    assert said in summary and "of 4 pictures of held-out edits (of skin tones 66.7%)" in summary
    report.write(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert "| questions, what | 50.0% | 20.0% | 3 | so |" in (tmp_path / "results.md").read_text()


def test_the_sheet_shows_prompts_edits_and_questions(tmp_path):
    picture = Image.new("RGB", (64, 64), "red")
    (tmp_path / "0.png").parent.mkdir(exist_ok=True)
    picture.save(tmp_path / "0.png")
    prompts = Made(["a"] * 9, [picture] * 9, [picture] * 9, [True] * 9, [0.1] * 9)
    edits = Made(["b"] * 3, [picture] * 3, [picture] * 3, [True, False, True], [0.1, 0.1, 0.4], [picture] * 3)
    assert edits.scores() == {"count": 3, "accuracy": 2 / 3, "chance": pytest.approx(0.2)} and not edits.scores("c")
    questions = [Question("0.png", "what?", "red")] * 2
    report.draw_sheet(prompts, edits, questions, ["red", "no"], tmp_path, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 600 and sheet.height > 400
