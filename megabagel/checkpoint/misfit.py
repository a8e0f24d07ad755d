"""How the tensors of a checkpoint differ from those that a model wants, as a readable list. It reads nothing."""

from collections.abc import Iterable, Mapping

_SHOWN = 3  # of each kind
_FOLLOWERS = ("optimizer.", "ema.")  # keys that repeat those of the weights

Shape = tuple[int, ...]


def misfits(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> str | None:
    """Tensors (key -> global shape) that are missing, have another shape, or are left over; None when all fit.

    A few of each kind are named, those of the weights before those that the optimizer or the average keeps of them.
    """
    kinds = (
        {key: f"is missing (expected {shape})" for key, shape in expected.items() if key not in found},
        {
            key: f"has shape {found[key]} (expected {shape})"
            for key, shape in expected.items()
            if key in found and found[key] != shape
        },
        {key: f"{shape} is not part of the model" for key, shape in found.items() if key not in expected},
    )
    named = [f"{key} {kind[key]}" for kind in kinds for key in _weights_first(kind)[:_SHOWN]]
    if not named:
        return None
    more = sum(map(len, kinds)) - len(named)
    return "; ".join(named) + (f"; and {more} more" if more else "")


def _weights_first(keys: Iterable[str]) -> list[str]:
    return sorted(keys, key=lambda key: (key.startswith(_FOLLOWERS), key))
