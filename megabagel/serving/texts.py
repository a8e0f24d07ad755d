"""Tokens of an answer as text, piece by piece, ended by the client's stop sequences. No model here."""

from collections.abc import Sequence

from megabagel.data.text import Tokenizer

_LONGEST_CHARACTER = 8  # tokens that may be needed for one character; more are broken bytes, and shown as such


class TextStream:
    """What is released never changes any more: half characters and what may become a stop sequence are held back."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []  # of the character that is not whole yet
        self._held = ""  # may be the beginning of a stop sequence
        self.tokens = 0
        self.stopped = False  # a stop sequence came; it and what follows are not part of the text

    def push(self, token: int) -> str:
        """The text that is certain now."""
        self.tokens += 1
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd") and len(self._ids) < _LONGEST_CHARACTER:
            return ""
        self._ids = []
        return self._release(text, final=False)

    def close(self) -> str:
        """The rest."""
        text, self._ids = self._tokenizer.decode(self._ids), []
        return self._release(text, final=True)

    def _release(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        ends = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return held[: min(ends)]
        keep = 0 if final else max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
