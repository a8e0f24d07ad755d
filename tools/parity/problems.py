"""The attention order and its problems from the splits alone, vectorised, for plans that are not made by the planner.

A path of its own on purpose: a parity check that used the planner's attention tables could not see an error in them.
"""

import numpy as np

from megabagel.packing.plan import CAUSAL, NOISE


def attention_problems(
    split_starts: np.ndarray, split_modes: np.ndarray, sample_lens: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """attention_index [L] and problems [P, 5] of a PackPlan.

    Neighbouring causal splits of a sample become one problem: they see what one text would.
    """
    noised = np.repeat(split_modes == NOISE, np.diff(split_starts, append=length))
    attention_index = np.concatenate([np.flatnonzero(~noised), np.flatnonzero(noised)])
    row_of = np.empty(length, dtype=np.int64)
    row_of[attention_index] = np.arange(length)
    shared_before = np.concatenate([[0], np.cumsum(~noised)])  # per sequence position

    sample_starts = np.cumsum(sample_lens) - sample_lens
    sample_of = np.searchsorted(sample_starts, split_starts, side="right") - 1
    causal = split_modes == CAUSAL
    continues = np.zeros(len(split_starts), dtype=bool)
    continues[1:] = causal[1:] & causal[:-1] & (sample_of[1:] == sample_of[:-1])
    starts, sample_of, causal = split_starts[~continues], sample_of[~continues], causal[~continues]
    prefix_start = shared_before[sample_starts[sample_of]]
    problems = [
        row_of[starts],
        np.diff(starts, append=length),
        prefix_start,
        shared_before[starts] - prefix_start,
        causal,
    ]
    return attention_index, np.stack([column.astype(np.int64) for column in problems], axis=1)
