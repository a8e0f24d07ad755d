"""The exception of every configuration fault, and the sentence about a misspelt key.

Which settings are legal is decided elsewhere (`fields.py`, `checks.py`).
"""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting of the user is wrong; the message says what, where, what is allowed and what to do."""


def unknown_key(where: str, key: str, allowed: Iterable[str]) -> ConfigError:
    """The error about `key`, which `where` (a file, a section of it) does not have, with the nearest allowed key."""
    allowed = list(allowed)
    near = difflib.get_close_matches(key.rpartition(".")[2], allowed, n=1, cutoff=0.4)
    hint = f", did you mean `{near[0]}`?" if near else ""
    return ConfigError(f"{where}: unknown key `{key}`{hint} (allowed here: {', '.join(allowed)}).")
