"""Counter-based random draws: a value depends on (seed, purpose, key) and on nothing else.

So a draw about a sample is the same in any worker, on any rank, in any parallel layout and after any resume. This is
not for weight initialisation or dropout inside the model, which follow megatron-core's own generator states.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.random.bit_generator import ISeedSequence

Shape = int | Sequence[int]


class _Key(ISeedSequence):
    """Gives a bit generator its key as it is. Through NumPy's own argument for that, the system's entropy is read first
    and dropped, which takes longer than a small draw."""

    def __init__(self, words: np.ndarray):
        self._words = words

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        """The two words that Philox asks for."""
        return self._words


def generator(seed: int, purpose: str, key: Sequence[int]) -> np.random.Generator:
    """A Philox generator whose 128-bit key is a hash of `seed`, `purpose` and `key`; for several draws of one kind."""
    identity = json.dumps([int(seed), purpose, [int(k) for k in key]]).encode()
    words = np.frombuffer(hashlib.blake2b(identity, digest_size=16).digest(), dtype="<u8")
    return np.random.Generator(np.random.Philox(_Key(words)))


def normal(seed: int, purpose: str, key: Sequence[int], shape: Shape = ()) -> np.ndarray:
    """Standard normal draws, float32 of `shape`."""
    return np.asarray(generator(seed, purpose, key).standard_normal(shape, dtype=np.float32))


def uniform(seed: int, purpose: str, key: Sequence[int], shape: Shape = ()) -> np.ndarray:
    """Draws from [0, 1), float32 of `shape`."""
    return np.asarray(generator(seed, purpose, key).random(shape, dtype=np.float32))


def integers(seed: int, purpose: str, key: Sequence[int], low: int, high: int, shape: Shape = ()) -> np.ndarray:
    """Draws from low .. high-1, int64 of `shape`."""
    return np.asarray(generator(seed, purpose, key).integers(low, high, size=shape, dtype=np.int64))
