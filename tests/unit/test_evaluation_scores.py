"""Every score equals its library's documented example, or its definition where the library documents none."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megabagel.config.errors import ConfigError
from megabagel.evaluation import distribution_scores, pixel_scores, text_scores, vqa, yes_no
from megabagel.evaluation.consistency import candidates
from megabagel.evaluation.extra import library

DEBIAN_WORDNET = Path(os.environ.get("WORDNET", "/usr/share/wordnet"))


def test_bleu_is_that_of_sacrebleus_readme():
    """Its three sentences with two references: 48.53 (README, section on the Python module)."""
    references = [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ]
    answers = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    assert text_scores.bleu(answers, references) == pytest.approx(48.530827, abs=1e-5)
    assert text_scores.bleu(["a b c d", "e f g h"], [["a b c d"], ["x", "e f g h"]]) == pytest.approx(100)


def test_rouge_is_that_of_rouge_scores_readme():
    answer, reference = "The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog"
    scores = text_scores.rouge(answer, [reference])
    assert scores["rouge1"] == pytest.approx(2 * 0.75 * (6 / 9) / (0.75 + 6 / 9))
    assert scores["rougeL"] == pytest.approx(2 * (5 / 8) * (5 / 9) / (5 / 8 + 5 / 9))
    assert text_scores.rouge("a cat", ["nothing", "a cat"])["rougeL"] == 1


METEOR_REFERENCES = [
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the command of the Party",
    "It is the practical guide for the army always to heed the directions of the party",
]
METEOR_ANSWER = "It is a guide to action which ensures that the military always obeys the commands of the party"


def test_meteor_is_that_of_nltks_docstring():
    """0.6944, where no synonym counts; with them under the test below."""

    class NoSynonyms:
        def synsets(self, word: str) -> list:
            return []

    assert text_scores.meteor(METEOR_ANSWER, METEOR_REFERENCES, NoSynonyms()) == pytest.approx(0.6944, abs=5e-5)


@pytest.mark.skipif(not DEBIAN_WORDNET.is_dir(), reason="needs the Debian package wordnet-base")
def test_meteor_knows_synonyms():
    reader = text_scores.wordnet(str(DEBIAN_WORDNET))
    assert text_scores.meteor(METEOR_ANSWER, METEOR_REFERENCES, reader) == pytest.approx(0.6944, abs=5e-5)
    assert text_scores.meteor("car", ["auto"], reader) == pytest.approx(0.5)
    assert text_scores.meteor("car", ["apple"], reader) == 0


def test_a_folder_without_wordnet_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="holds no data.noun; give a WordNet folder, see --wordnet"):
        text_scores.wordnet(str(tmp_path))


@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_cider_is_that_of_pycocoevalcap_and_needs_java(monkeypatch):
    """Ten captions whose words no other picture's captions share: 10 by definition; an unrelated one: 0."""
    text_scores.require_java()
    given = [[f"w{n}a w{n}b w{n}c w{n}d w{n}e."] for n in range(4)]
    answers = ["W0a w0b w0c w0d w0e", "w1a w1b w1c w1d w1e!", "other words", ""]
    score, each = text_scores.cider(answers, given)
    assert each == pytest.approx([10, 10, 0, 0]) and score == pytest.approx(5)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="score cider needs Java"):
        text_scores.require_java()


def test_a_library_that_is_not_there_is_one_sentence():
    with pytest.raises(ConfigError, match=r"needs the package of no_such_library.*\[eval\]"):
        library("no_such_library")


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("The Cat.", "cat"),
        ("two", "2"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldntve", "couldn't've"),
        ("its", "its"),
        ("yes, it is", "yes it is"),
        ("red/blue", "red blue"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("a.m.", "am"),
        ("What?!", "what"),
        ("an apple\n", "apple"),
    ],
)
def test_short_answers_are_normalised_as_in_the_vqa_challenge(answer, normalised):
    assert vqa.normalise(answer) == normalised


def test_soft_accuracy_counts_agreeing_people():
    """The challenge's formula: at least three of the other nine, averaged over leaving one out."""
    people = ["yes"] * 3 + ["no"] * 7
    assert vqa.accuracy("Yes.", people) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa.accuracy("no", people) == 1 and vqa.accuracy("maybe", people) == 0
    assert vqa.accuracy("Blue", ["blue"]) == 1 and vqa.accuracy("red", ["blue"]) == 0
    assert vqa.exact_match("a dog", ["cat", "the dog"]) == 1 and vqa.exact_match("dogs", ["dog"]) == 0


def test_mme_needs_both_answers_of_a_picture_right():
    answers = ["Yes, it is.", "No.", "yes", "yes", "maybe", "no"]
    labels = ["Yes", "No", "Yes", "No", "Yes", "No"]
    scores = yes_no.mme(answers, labels, ["a", "a", "b", "b", "a", "a"], ["color"] * 4 + ["code_reasoning"] * 2)
    assert scores["color/accuracy"] == 75 and scores["color/accuracy+"] == 50 and scores["perception"] == 125
    assert scores["code_reasoning/accuracy"] == 50 and scores["code_reasoning/accuracy+"] == 0
    assert scores["cognition"] == 50


def test_pope_reads_the_first_sentence():
    answers = ["Yes, there is. No dog though.", "There is not a cat.", "Yes", "No, there is no."]
    scores = yes_no.pope(answers, ["yes", "yes", "no", "no"])
    assert scores == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5}
    assert yes_no.pope(["no"], ["yes"])["f1"] == 0


def picture(seed: int, side: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def test_psnr_and_ssim_follow_their_definitions():
    image = Image.new("RGB", (32, 32), (100, 100, 100))
    other = Image.new("RGB", (32, 32), (110, 110, 110))
    assert pixel_scores.psnr(image, other) == pytest.approx(20 * np.log10(255 / 10), abs=1e-4)
    assert pixel_scores.psnr(image, image) == pixel_scores.IDENTICAL
    constant = (0.01 * 255) ** 2  # two flat pictures differ in brightness alone
    expected = (2 * 100 * 110 + constant) / (100**2 + 110**2 + constant)
    assert pixel_scores.ssim(image, other) == pytest.approx(expected, abs=1e-4)
    assert pixel_scores.ssim(picture(0), picture(0)) == pytest.approx(1)
    assert pixel_scores.psnr(image, other.resize((64, 64))) == pixel_scores.psnr(image, other)


class ToyVgg(torch.nn.Module):
    def forward(self, pixels: torch.Tensor, resize_images: bool = True, return_lpips: bool = False) -> torch.Tensor:
        assert return_lpips and not resize_images
        return pixels.mean([2, 3]) / 255


class ToyInception(torch.nn.Module):
    def forward(self, pixels: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features and pixels.dtype == torch.uint8
        return pixels.float().flatten(1)[:, :5] / 255


def test_networks_of_others_are_called_as_their_files_want(tmp_path):
    torch.jit.script(ToyVgg()).save(tmp_path / "vgg.pt")
    lpips = pixel_scores.Lpips(str(tmp_path / "vgg.pt"), "cpu")
    black, red = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "red")
    assert lpips(black, red) == pytest.approx(1) and lpips(red, red) == 0
    torch.jit.script(ToyInception()).save(tmp_path / "inception.pt")
    features = distribution_scores.Inception(str(tmp_path / "inception.pt"), "cpu")(red)
    assert distribution_scores.unpack([features]).tolist() == [[1, 1, 1, 1, 1]]
    (tmp_path / "bad.pt").write_bytes(b"no network")
    with pytest.raises(ConfigError, match="models.vgg: .*bad.pt is no TorchScript file .*; see --vgg"):
        pixel_scores.Lpips(str(tmp_path / "bad.pt"), "cpu")


def test_fid_and_kid_follow_their_definitions():
    draw = np.random.default_rng(0)
    made, real = (torch.from_numpy(draw.normal(mean, 1 + mean, (60, 4))) for mean in (0.0, 0.5))
    (m1, s1), (m2, s2) = ((x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)) for x in (made, real))
    eigenvalues = np.linalg.eigvals(s1 @ s2)
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.sqrt(eigenvalues.real).sum()
    assert distribution_scores.fid(made, real) == pytest.approx(expected, rel=1e-6)
    assert distribution_scores.fid(made, made) == pytest.approx(0, abs=1e-6)

    def kernel(a, b):
        return (a @ b.T / 4 + 1) ** 3

    within = sum((kernel(x, x).sum() - kernel(x, x).trace()) / (60 * 59) for x in (made, real))
    mean, deviation = distribution_scores.kid(made, real)  # every subset is the whole
    assert mean == pytest.approx(float(within - 2 * kernel(made, real).mean()), rel=1e-4)
    assert deviation == pytest.approx(0, abs=1e-5)
    state = torch.get_rng_state()
    assert distribution_scores.kid(made, real)[0] == mean and torch.equal(torch.get_rng_state(), state)


def test_candidates_are_the_right_prompt_and_others_than_it():
    prompts = ["a", "b", "a", "c", "d"]
    found = candidates(prompts, 2, 2)
    assert found[0] == "a" and len(set(found)) == 3 and found == candidates(prompts, 2, 2)
    assert candidates(["a", "a"], 0, 9) == ["a"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A CLIP model and a text encoder of random weights, with a vocabulary of a few words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "cat", "dog", "blue", "circle"]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", **special)
    root, tiny = tmp_path_factory.mktemp("models"), {"hidden_size": 16, "intermediate_size": 16}
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, **tiny}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=16, max_position_embeddings=16, **layers))
    text = {"vocab_size": 16, "max_position_embeddings": 16, "eos_token_id": 3, "bos_token_id": 2, **layers}
    vision = {"image_size": 32, "patch_size": 16, **layers}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    for name, model in (("bert", bert), ("clip", clip)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)(**size)
    processor.save_pretrained(root / "clip")
    return root


def test_bertscore_is_greedy_matching_of_embeddings(folders):
    """F1 of mean best cosines, tokens at the ends left out (Zhang et al. 2020, section 3)."""
    score = text_scores.BertScore(str(folders / "bert"), None, "cpu")
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = (
        AutoTokenizer.from_pretrained(folders / "bert"),
        AutoModel.from_pretrained(folders / "bert").eval(),
    )

    def embed(text: str) -> torch.Tensor:
        with torch.no_grad():
            hidden = model(**{k: v for k, v in tokenizer(text, return_tensors="pt").items() if k != "token_type_ids"})
        return torch.nn.functional.normalize(hidden.last_hidden_state[0, 1:-1], dim=-1)

    cosines = embed("a red cat") @ embed("a blue circle dog").T
    precision, recall = cosines.max(1).values.mean(), cosines.max(0).values.mean()
    assert score("a red cat", ["a blue circle dog"]) == pytest.approx(
        float(2 * precision * recall / (precision + recall)), abs=1e-5
    )
    assert score("a red cat", ["dog", "a red cat"]) == pytest.approx(1, abs=1e-5)


def test_clip_similarities_are_cosines_of_the_models_embeddings(folders, tmp_path):
    from transformers import AutoTokenizer, CLIPModel

    from megabagel.evaluation.clip_scores import Clip, clip_score

    image, texts = picture(1, 32), ["a red cat", "a blue circle"]
    found = Clip(str(folders / "clip"), "cpu").similarities(image, texts)
    model = CLIPModel.from_pretrained(folders / "clip").eval()
    tokens = AutoTokenizer.from_pretrained(folders / "clip")(texts, padding=True, return_tensors="pt")
    mean, deviation = (
        torch.tensor(values)[:, None, None]
        for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    pixels = (pixel_scores.as_pixels(image)[0] / 255 - mean) / deviation
    with torch.no_grad():
        given = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        output = model(pixel_values=pixels[None], **given)
    assert found == pytest.approx((output.image_embeds @ output.text_embeds.T)[0].tolist(), abs=1e-5)
    assert clip_score(0.25) == 25 and clip_score(-0.1) == 0
    with pytest.raises(ConfigError, match="models.clip: .* is no CLIP folder .*; see --clip"):
        Clip(str(tmp_path), "cpu")
