"""The tokenizer: golden ids, missing frame tokens, clear errors."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from megabagel.data.faults import DataError
from megabagel.data.text import FRAME_TOKENS, Tokenizer
from megabagel.packing.geometry import SpecialTokens
from tests.unit.data_fixtures import TOKENIZER


def test_ids_equal_the_golden_ones_also_after_pickling():
    meta = json.loads((Path(TOKENIZER).parent / "meta.json").read_text())
    tokenizer = pickle.loads(pickle.dumps(Tokenizer(TOKENIZER)))
    assert tokenizer.special == SpecialTokens(501, 502, 503, 504)
    assert len(tokenizer) == 505
    texts = [item for sample in meta["samples"] for item in sample["sequence_plan"] if item["type"] == "text"]
    assert len(texts) > 5
    for item in texts:
        assert tokenizer.encode(item["text"]) == item["text_ids"]
        assert tokenizer.decode(item["text_ids"]) == item["text"]


def test_vocabulary_and_merges_are_enough(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(Path(TOKENIZER) / name, tmp_path / name)
    tokenizer = Tokenizer(str(tmp_path))
    assert tokenizer.encode("A red cat sits") == Tokenizer(TOKENIZER).encode("A red cat sits")


def test_missing_frame_tokens_are_added_behind_the_vocabulary(tmp_path):
    content = json.loads((Path(TOKENIZER) / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in FRAME_TOKENS]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer(str(tmp_path))
    size = len(tokenizer)
    special = tokenizer.special
    assert [special.bos, special.eos, special.start_of_image, special.end_of_image] == [*range(size - 4, size)]


def test_the_fingerprint_tells_tokenizers_apart(tmp_path):
    content = json.loads((Path(TOKENIZER) / "tokenizer.json").read_text())
    same, other = tmp_path / "same", tmp_path / "other"
    for folder in (same, other):
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(content))
        content["model"]["merges"].pop()
    assert Tokenizer(str(same)).fingerprint == Tokenizer(TOKENIZER).fingerprint != Tokenizer(str(other)).fingerprint


def test_unusable_folders_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Tokenizer(str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"neither tokenizer.json nor vocab.json"):
        Tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer(str(tmp_path))
