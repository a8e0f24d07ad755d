"""The files of a BAGEL folder, read part by part: what the converters read, imitate and carry along.

A converted checkpoint carries a folder of the same kind in which weights have been replaced by their headers
(`ema.safetensors.header`) and what no model of ours takes lies in `rest.safetensors`; this reads that one too.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.safetensors_file import SafetensorsFile, Spec, make_head, read_head
from megabagel.config.folder import HEADER_ALONE as HEADER

STEMS = ("ema", "model")
_REST = "rest.safetensors"


def stems_in(folder: Path) -> tuple[str, ...]:
    """Which of the sets of weights `ema` and `model` have files of their own in `folder`."""
    found = tuple(
        stem for stem in STEMS if any((folder / f"{stem}.safetensors{end}").is_file() for end in ("", HEADER))
    )
    if found:
        return found
    divided = (stem for stem in ("model", "ema") if (folder / f"{stem}.safetensors.index.json").is_file())
    return tuple(divided)[:1]


def side_files(folder: Path) -> Iterator[Path]:
    """Everything beside weights and their indices: configurations, tokenizer, autoencoder, texts."""
    for path in sorted(folder.iterdir()):
        is_weights = path.name.startswith((*STEMS, _REST)) and ".safetensors" in path.name
        if path.is_file() and not is_weights:
            yield path


class BagelFolder:
    """One set of weights of a folder: `{stem}.safetensors`, or the files that its index names.

    The first of `stems` that the folder holds wins. Raises CheckpointError when none is there or one is damaged.
    """

    def __init__(self, folder: str | Path, stems: tuple[str, ...] = STEMS):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"there is no folder {self.folder} to read weights from")
        self.carried = any(self.folder.glob(f"*.safetensors{HEADER}"))
        self.files = {name: self._open(name) for name in self._file_names(stems)}
        self._file_of = {name: file for file in self.files.values() for name in file.specs}
        rest = self.folder / _REST
        self._rest = SafetensorsFile(rest, read_head(rest)) if self.carried and rest.is_file() else None

    def _file_names(self, stems: tuple[str, ...]) -> list[str]:
        for stem in stems:
            name = f"{stem}.safetensors"
            if self._path(name).is_file():
                return [name]
            index = self.folder / f"{name}.index.json"
            if index.is_file():
                try:
                    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise CheckpointError(f"{index} is not an index of safetensors files; copy it again") from None
        wanted = " or ".join(f"{stem}.safetensors" for stem in stems)
        raise CheckpointError(f"{self.folder} holds neither {wanted} nor an index JSON beside it")

    def _path(self, name: str) -> Path:
        return self.folder / (name + HEADER if self.carried else name)

    def _open(self, name: str) -> SafetensorsFile:
        path = self._path(name)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, although the index of {self.folder} names it")
        file = SafetensorsFile(path, read_head(path))
        if not self.carried:
            file.check_size()
        return file

    def names(self) -> set[str]:
        return set(self._file_of)

    def holds(self, name: str) -> bool:
        return name in self._file_of

    def close(self) -> None: ...

    def spec(self, name: str) -> Spec:
        """Raises CheckpointError when there is no such tensor."""
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder} has no tensor {name}, which the configured model needs")
        return self._file_of[name].specs[name]

    def file_of(self, name: str) -> str:
        """Name of the file that holds a tensor."""
        return next(file for file, content in self.files.items() if name in content.specs)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises CheckpointError when there is no such tensor."""
        return self.spec(name).shape

    def read_whole(self, name: str) -> Tensor:
        """A tensor that no model takes, or any one where the weights are there."""
        if self.carried:
            return self._rest.read(f"{self.file_of(name)}/{name}")
        return self._file_of[name].read(name)

    def read(self, name: str, shape: tuple[int, ...], dim: int | None, start: int, stop: int) -> Tensor:
        """See `names.Source`, for rows only; in the dtype of the file."""
        if (found := self.shape(name)) != shape:
            raise CheckpointError(
                f"tensor {name} in {self._file_of[name].path} has shape {list(found)}, but the model of its "
                f"configuration expects {list(shape)}; take the configuration that belongs to the weights"
            )
        return self._file_of[name].read(name) if dim is None else self._file_of[name].read(name, start, stop)


def carry(sets: list[BagelFolder], taken: set[str], target: Path) -> None:
    """Write into `target` the headers of the weights of `sets`, their indices, and the tensors not in `taken`."""
    files = {name: (of, file) for of in sets for name, file in of.files.items()}
    for name, (_, file) in files.items():
        (target / (name + HEADER)).write_bytes(file.head)
    for index in {path for of in sets for path in of.folder.glob("*.safetensors.index.json")}:
        shutil.copy(index, target / index.name)
    rest = {
        f"{name}/{tensor}": (of, tensor, spec)
        for name, (of, file) in files.items()
        for tensor, spec in file.specs.items()
        if tensor not in taken
    }
    if rest:
        file = SafetensorsFile(target / _REST, make_head({key: spec for key, (*_, spec) in rest.items()}))
        file.begin()
        for key, (of, tensor, _) in rest.items():
            file.write(key, of.read_whole(tensor))
