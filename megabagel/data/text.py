"""The tokenizer of a BAGEL or Qwen2.5 folder: text to ids, and the ids of the tokens that frame items.

Chat templates and system prompts are not here: BAGEL frames items itself.
"""

import hashlib
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from megabagel.data.faults import DataError
from megabagel.packing.geometry import SpecialTokens

FRAME_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


class Tokenizer:
    """Byte-level BPE with the four frame tokens. Cheap to send to worker processes: only the folder travels."""

    def __init__(self, folder: str) -> None:
        """Raises DataError when `folder` holds no tokenizer that can be read."""
        self.folder = folder
        self._backend = _load(Path(folder))
        missing = [token for token in FRAME_TOKENS if self._backend.token_to_id(token) is None]
        self._backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
        self.special = SpecialTokens(*(self._backend.token_to_id(token) for token in FRAME_TOKENS))

    def __reduce__(self):
        return Tokenizer, (self.folder,)

    def __len__(self) -> int:
        """One more than the largest id; the model's vocabulary must be at least this large."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal hash of all that decides how texts become ids."""
        return hashlib.blake2b(self._backend.to_str().encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no frame tokens added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, frame tokens left out."""
        return self._backend.decode(ids, skip_special_tokens=True)


def _load(folder: Path) -> FastTokenizer:
    if not folder.is_dir():
        raise DataError(f"tokenizer folder {folder} does not exist; set data.tokenizer to one with tokenizer.json.")
    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            return FastTokenizer.from_file(str(file))
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            # Slow to import, and needed only for folders without tokenizer.json.
            from transformers import Qwen2TokenizerFast

            return Qwen2TokenizerFast.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
    except Exception as error:  # the tokenizers library raises bare Exception
        raise DataError(f"tokenizer in {folder} cannot be read: {error}.") from None
    raise DataError(f"tokenizer folder {folder} has neither tokenizer.json nor vocab.json with merges.txt.")
