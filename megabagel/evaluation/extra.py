"""Libraries that only evaluation needs, imported when a score is computed."""

import importlib
from types import ModuleType

from megabagel.config.errors import ConfigError


def library(name: str) -> ModuleType:
    """The module `name`; ConfigError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"evaluation needs the package of {name}, in which {error.name} is missing; install the extra: "
            "pip install --no-build-isolation -e '.[eval]'."
        ) from None
