"""Readers over sources without files, and several readers at once in threads: data-parallel replicas of one process."""

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from unittest import mock

from megabagel.config.datasets import DatasetPaths, GroupConfig
from megabagel.data import loader
from megabagel.data.document import Entry, ImageSource
from megabagel.data.faults import DataFault, Fault
from megabagel.data.reader import Reader
from megabagel.data.steps import EndOfData
from tests.unit.data_fixtures import TRANSFORM, make_reader, png

GLOBAL_BATCH = 12


@dataclass
class Rows:
    """A source of texts of various lengths, every fifth with a picture."""

    num_rows: int
    bad: frozenset[int] = frozenset()  # rows that measuring refuses
    late: frozenset[int] = frozenset()  # rows whose picture's header is good and nothing else
    window: int | None = None
    faults: list[Fault] = field(default_factory=list)

    @property
    def blocks(self) -> list[int]:
        return [self.num_rows]

    def origin(self, row: int) -> str:
        return f"rows:{row}"

    def document(self, row: int, key: tuple[int, ...]) -> list[Entry]:
        if row in self.bad:
            raise DataFault("bad_row", "it is bad")
        text = Entry(text="word " * (row * 7 % 23), loss=row % 5 > 0)
        if row % 5 and row not in self.late:
            return [text]
        picture = png(row, (32, 16))
        return [text, Entry(image=ImageSource(0, picture[:50] if row in self.late else picture), loss=True)]


def group(**fields) -> GroupConfig:
    return GroupConfig({"one": DatasetPaths(path="rows.jsonl")}, TRANSFORM, **{"format": "sequence", **fields})


class Meeting:
    """Where readers in threads exchange lists."""

    def __init__(self, size: int) -> None:
        self._barrier, self._lists = threading.Barrier(size, timeout=60), [[] for _ in range(size)]

    def exchange(self, rank: int):
        def exchange(values: list) -> list[list]:
            self._lists[rank] = values
            self._barrier.wait()
            everyone = list(self._lists)
            self._barrier.wait()
            return everyone

        return exchange

    def abort(self) -> None:
        self._barrier.abort()


@contextlib.contextmanager
def replicas(groups: dict[str, GroupConfig], sources: dict[str, Rows], size: int = 1, **fields):
    """Readers of `size` replicas over these sources; `fields` as of `make_reader`."""
    meeting = Meeting(size)
    fields = {"global_batch_size": GLOBAL_BATCH, **fields}
    with contextlib.ExitStack() as stack, mock.patch.object(loader, "open_source", lambda name, *_: sources[name]):
        yield Replicas(
            [
                stack.enter_context(
                    make_reader(groups, rank, size, exchange=meeting.exchange(rank) if size > 1 else None, **fields)
                )
                for rank in range(size)
            ],
            meeting,
        )


class Replicas:
    """Several readers as one."""

    def __init__(self, readers: list[Reader], meeting: Meeting) -> None:
        self.readers, self._meeting = readers, meeting

    def next_step(self) -> list:
        """All packs of a step, as they were before they were dealt to the replicas."""
        shares = self._all(lambda reader: reader.next_step())
        return [pack for packs in zip(*shares, strict=True) for pack in packs]

    def steps(self, number: int | None = None) -> list[list]:
        """So many steps, or all until the data end."""
        steps = []
        with contextlib.suppress(EndOfData):
            while number is None or len(steps) < number:
                steps.append(self.next_step())
        return steps

    def state(self) -> dict:
        """The state, which is the same everywhere and survives JSON."""
        states = [reader.state_dict() for reader in self.readers]
        assert all(state == states[0] for state in states)
        return json.loads(json.dumps(states[0]))

    def load(self, state: dict) -> None:
        self._all(lambda reader: reader.load_state_dict(state))

    def _all(self, action) -> list:
        if len(self.readers) == 1:
            return [action(self.readers[0])]

        def attempt(reader: Reader):
            try:
                return action(reader)
            except EndOfData:  # all raise it
                raise
            except BaseException:
                self._meeting.abort()
                raise

        with ThreadPoolExecutor(len(self.readers)) as threads:
            futures = [threads.submit(attempt, reader) for reader in self.readers]
            for future in futures:
                future.exception()
            return [future.result() for future in futures]


def keys_of(steps: list[list]) -> list[list[list[tuple[int, ...]]]]:
    """Of every sample of every pack of every step."""
    return [[pack.keys for pack in step] for step in steps]
