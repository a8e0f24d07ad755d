"""The exception of every configuration fault, and the parts that many sentences share.

Which settings are legal is decided elsewhere (`fields.py`, `checks.py`).
"""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting of the user is wrong; the message says what, where, what is allowed and what to do."""


def listed(numbers: Iterable[int]) -> str:
    """Allowed numbers, in ascending order, for a sentence: all of them, or where they begin and end."""
    numbers = list(numbers)
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    shown = [*numbers[:11], "...", numbers[-1]] if len(numbers) > 12 else numbers
    return ", ".join(map(str, shown))


def divisors(*values: int) -> str:
    """Which sizes divide all `values`, as the end of a sentence."""
    return f"sizes that do are {listed(n for n in range(1, min(values) + 1) if not any(value % n for value in values))}"


def unknown_key(where: str, key: str, allowed: Iterable[str]) -> ConfigError:
    """The error about `key`, which `where` (a file, a section of it) does not have, with the nearest allowed key."""
    allowed = list(allowed)
    near = difflib.get_close_matches(key.rpartition(".")[2], allowed, n=1, cutoff=0.4)
    hint = f", did you mean `{near[0]}`?" if near else ""
    return ConfigError(f"{where}: unknown key `{key}`{hint} (allowed here: {', '.join(allowed)}).")
