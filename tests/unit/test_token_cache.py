"""The token cache: the same ids as the tokenizer, shared by processes, and never a reason to stop."""

import logging
import pickle
import sqlite3
from pathlib import Path

import pytest

from megabagel.data.text import Tokenizer
from megabagel.data.token_cache import TokenCache
from tests.unit.data_fixtures import TOKENIZER

TEXTS = [f"a text that is long enough to be worth a look-up, number {n}" for n in range(150)]


class Counting(Tokenizer):
    calls = 0

    def encode(self, text):
        self.calls += 1
        return super().encode(text)


@pytest.fixture
def tokenizer():
    return Counting(TOKENIZER)


def filled(folder: Path, tokenizer: Tokenizer) -> TokenCache:
    cache = TokenCache(str(folder), tokenizer.fingerprint)
    for text in TEXTS:
        cache.encode(text, tokenizer)
    cache.flush()
    return cache


def test_texts_are_tokenised_once_and_found_by_others(tmp_path, tokenizer):
    expected = [Tokenizer(TOKENIZER).encode(text) for text in TEXTS]
    cache = filled(tmp_path / "new" / "folder", tokenizer)
    assert tokenizer.calls == len(TEXTS)
    for same in (cache, pickle.loads(pickle.dumps(cache))):
        assert [same.encode(text, tokenizer) for text in TEXTS] == expected
    assert tokenizer.calls == len(TEXTS)


def test_what_is_not_written_yet_is_found_too(tmp_path, tokenizer):
    cache = TokenCache(str(tmp_path), tokenizer.fingerprint)
    assert cache.encode(TEXTS[0], tokenizer) == cache.encode(TEXTS[0], tokenizer)
    assert tokenizer.calls == 1


def test_tokenizers_do_not_see_each_others_ids(tmp_path, tokenizer):
    filled(tmp_path, tokenizer)
    TokenCache(str(tmp_path), "another").encode(TEXTS[0], tokenizer)
    assert tokenizer.calls == len(TEXTS) + 1


def damage_file(folder: Path) -> None:
    for file in folder.iterdir():
        file.write_bytes(b"garbage" * 1000)


def damage_values(folder: Path) -> None:
    with sqlite3.connect(folder / "tokens.sqlite") as connection:
        connection.execute("UPDATE tokens SET ids = x'0102030405060708'")


def a_file_in_the_way(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.write_text("")


def read_only(folder: Path) -> None:
    (folder / "tokens.sqlite").unlink()
    (folder / "tokens.sqlite").mkdir()  # what root cannot write either


@pytest.mark.parametrize("damage", [damage_file, damage_values, a_file_in_the_way, read_only])
def test_a_damaged_cache_is_one_warning(damage, tmp_path, tokenizer, caplog):
    folder = tmp_path / "cache"
    cache = filled(folder, tokenizer)
    cache._connection.close()
    damage(folder)
    with caplog.at_level(logging.WARNING):
        again = TokenCache(str(folder), tokenizer.fingerprint)
        assert [again.encode(text, tokenizer) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert [record.message.split(" (")[0] for record in caplog.records] == [f"token cache {folder} cannot be used"]
