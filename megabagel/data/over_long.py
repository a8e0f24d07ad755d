"""What is done with a sample above the token limit: its texts are cut, or its pictures shrink, or it is left out.

The rules are deterministic, so that measuring a sample again gives the same; how many tokens a pack may hold is decided
in `packing`.
"""

from collections.abc import Sequence


def cut_lengths(lengths: Sequence[int], excess: int) -> list[int] | None:
    """Lengths of texts, in tokens, after `excess` tokens in all are taken from the ends of the longest ones.

    No text falls below one token, and empty ones stay. None where that is not enough.
    """
    allowed = sum(lengths) - excess
    if allowed < sum(min(length, 1) for length in lengths):
        return None
    low, high = 1, max(lengths, default=1)  # the largest common limit that fits
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(length, middle) for length in lengths) <= allowed:
            low = middle
        else:
            high = middle - 1
    cut = [min(length, low) for length in lengths]
    for i, length in enumerate(lengths):  # what is left goes to the first ones
        if cut[i] < length and sum(cut) < allowed:
            cut[i] += 1
    return cut


def shrunk(width: int, height: int, stride: int, halvings: int) -> tuple[int, int]:
    """Sides in pixels once the area was halved `halvings` times, multiples of `stride`, at least one."""
    scale = 0.5 ** (halvings / 2)
    return tuple(max(1, round(side * scale / stride)) * stride for side in (width, height))
