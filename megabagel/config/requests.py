"""Files of things to ask a model: prompts for pictures, edits of pictures, questions. YAML, JSON or JSON lines.

`read_entries` reads and types them and resolves paths. Asking is the matter of `megabagel.inference`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import yaml

from megabagel.config.errors import ConfigError
from megabagel.config.fields import build


@dataclass
class Request:
    """A picture of `prompt`, which is an edit of the last of `images` if there are any; or an answer to `question`."""

    prompt: str | None = None
    question: str | None = None
    images: list[str] = field(default_factory=list)  # shown first; relative to the file, absolute once loaded
    height: int | None = None  # of the picture to be made; null: that of the last one shown, else the largest
    width: int | None = None

    @property
    def draws(self) -> bool:
        """Whether a picture is asked for."""
        return self.prompt is not None

    @property
    def text(self) -> str:
        """What is said to the model."""
        return self.prompt if self.draws else self.question


Entry = TypeVar("Entry", bound=Request)


def read_entries(path: str | Path, cls: type[Entry], setting: str) -> list[Entry]:
    """All entries of the file as `cls`, pictures with absolute paths. `setting` names the file in messages.

    Raises ConfigError: a file that is missing, empty or no list; an entry with a wrong key or type, with none or both
    of `prompt` and `question`, or with a picture that is not there.
    """
    path = Path(path)
    entries = []
    for number, value in enumerate(_parsed(path, setting), 1):
        where = f"{setting}: {path}, entry {number}"
        entry = build(cls, value, where)
        if (entry.prompt is None) == (entry.question is None):
            raise ConfigError(f"{where}: give either `prompt`, for a picture, or `question`, for an answer.")
        entry.images = [str(located(image, path, f"{where}, key `images`")) for image in entry.images]
        entries.append(entry)
    if not entries:
        raise ConfigError(f"{setting}: {path} has no entry; give at least one.")
    return entries


def located(name: str, file: Path, where: str) -> Path:
    """The file `name`, relative to the folder of `file`. Raises ConfigError when it is not there."""
    found = (file.parent / Path(name).expanduser()).absolute()
    if not found.is_file():
        raise ConfigError(f"{where}: there is no file {found} (relative paths count from {file.parent.absolute()}).")
    return found


def _parsed(path: Path, setting: str) -> list:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be read ({error.strerror}); give another file.") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{setting}: {path} is no {path.suffix[1:].upper() or 'YAML'} file ({error}).") from None
    if not isinstance(content, list):
        raise ConfigError(f"{setting}: {path} must hold a list of entries.")
    return content
