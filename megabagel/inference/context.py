"""What a model has read so far in one conversation: cached keys and values, and the RoPE position that comes next."""

from dataclasses import dataclass

from megabagel.inference.cache import KeyValueCache


@dataclass
class Context:
    """Grows by what is kept in it; a noised picture looks at it and leaves it as it was."""

    cache: KeyValueCache
    rope: int = 0  # RoPE id of the next token, or of the whole next picture

    @classmethod
    def empty(cls, layers: int) -> "Context":
        """For a model with so many decoder layers."""
        return cls(KeyValueCache(layers))

    @property
    def length(self) -> int:
        """Tokens read."""
        return self.cache.length

    def fork(self) -> "Context":
        """A context of its own that has read the same."""
        return Context(self.cache.copy(), self.rope)
