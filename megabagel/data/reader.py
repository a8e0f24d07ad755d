"""The reader of one model replica: the packs of each step that are its own, with pixels; a state of a few integers.

All replicas plan the same steps (`stream.py`, `steps.py`) and read their own packs ahead, in workers where there are
any. Sending packs to the other ranks of a replica is `broadcast.py`.
"""

import copy
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megabagel.config.datasets import GroupConfig
from megabagel.config.schema import DataConfig
from megabagel.data.faults import DataError, Fault, FaultLog
from megabagel.data.loader import SampleMaker
from megabagel.data.pack import Pack, make_pack
from megabagel.data.prepare import Known, Preparer, pixel_bytes
from megabagel.data.steps import PlannedStep, StepPlanner
from megabagel.data.stream import Exchange, Measured, Stream
from megabagel.data.text import Tokenizer
from megabagel.data.workers import open_pool
from megabagel.packing.cost import CostModel
from megabagel.packing.geometry import Geometry
from megabagel.packing.splits import PlannedSample

MAX_STEPS_AHEAD = 16  # however few bytes they hold
NEW_STEPS = 2  # that a call begins to read beyond its own: a reader fills up over several steps
_MIB = 1 << 20

Late = list[tuple[int, Fault]]  # group and fault of samples whose pixels turned out to be broken


@dataclass
class _Ahead:
    """A planned step whose pictures are being read."""

    step: PlannedStep
    result: Callable[[], tuple[list[Pack], Late]]  # waits


class Reader:
    """Gives the packs of one step after the other. Close it, or use it in a `with` block, to end its workers."""

    def __init__(
        self,
        config: DataConfig,
        groups: dict[str, GroupConfig],
        tokenizer: Tokenizer,
        geometry: Geometry,
        *,
        tile: int,
        total_length: int | None = None,
        global_batch_size: int = 1,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        exchange: Exchange | None = None,
        cost_model: CostModel | None = None,
        faults_file: Path | None = None,
        visual_und: bool = True,
        visual_gen: bool = True,
        known: Sequence[Known | None] | None = None,
        max_packs: int | None = None,
    ) -> None:
        """`tile` and `total_length`: see `planner.build_plan`. `global_batch_size`: packs of a step, of which this
        replica gets its share. `exchange` gathers lists over the replicas' readers, which make the same calls;
        `cost_model`: work of a sample, null: its tokens. `faults_file` lists bad rows; replica 0 writes it.
        `visual_und`, `visual_gen`: what the model has. `known`: pictures of each group that need not be opened.
        `max_packs`: of all replicas, after which the data end; null: no limit.

        Raises DataError when a group cannot be read at all and ValueError when numbers contradict each other.
        """
        self._rank, self._size, self._exchange = data_parallel_rank, data_parallel_size, exchange
        if (exchange is None) != (data_parallel_size == 1):
            raise ValueError(f"{data_parallel_size} readers need {'an' if exchange is None else 'no'} exchange")
        self._make_pack = partial(make_pack, geometry=geometry, tile=tile, total_length=total_length)
        self._names, self._cost_model, self._geometry = list(groups), cost_model, geometry
        self._known = known
        preparer = Preparer(groups, config, tokenizer, geometry, visual_und, visual_gen, known)
        maker = SampleMaker(groups, preparer, config.seed)
        self._num_rows = [order.num_rows for order in maker.orders]
        rows, is_first = dict(zip(self._names, self._num_rows, strict=True)), data_parallel_rank == 0
        self._faults = FaultLog(rows, config.max_bad_fraction, faults_file if is_first else None, say=is_first)
        self._judge = FaultLog(rows, config.max_bad_fraction, say=False)  # of what is planned, which is ahead
        for name, source in zip(self._names, maker.sources, strict=True):
            for fault in source.faults:
                self._faults.file_fault(name, fault)
        self._pool = open_pool(maker, config.num_workers)
        self._stream = Stream(
            partial(self._pool.submit, "measure"),
            self._weigh,
            [g.repeats and g.repeats * n for g, n in zip(groups.values(), self._num_rows, strict=True)],
            data_parallel_rank,
            data_parallel_size,
            exchange,
        )
        self._planner = StepPlanner(
            config, groups, self._stream, self._judge, global_batch_size, data_parallel_size, max_packs
        )
        self._assembly = ThreadPoolExecutor(1, "packs") if config.num_workers else None
        self._most_bytes = config.prefetch_mib * _MIB
        self._steps: deque[_Ahead] = deque()
        self._stop: PlannedStep | None = None
        self._plan_state = self._planner.state()

    def next_step(self) -> list[Pack]:
        """This replica's packs of the next step, in order. Its samples are read ahead from the first call on.

        Raises EndOfData when the groups have been repeated as often as they may be, DataError when too many rows of
        a group cannot be used.
        """
        if not self._steps:
            self._plan()
        if not self._steps:
            return self._end()
        self._plan_ahead()
        ahead = self._steps.popleft()
        packs, late = ahead.result()
        if self._exchange is not None:
            late = [fault for of_replica in self._exchange(late) for fault in of_replica]
        self._record(ahead.step)
        self._record_late(late)
        return packs

    def state_dict(self) -> dict:
        """State after the last step that was handed out, whatever was read ahead. Integers, strings, lists, dicts.

        The same on all replicas.
        """
        state = {
            "groups": list(self._names),
            "num_rows": list(self._num_rows),
            **self._plan_state,
            "faults": self._faults.state_dict(),
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict) -> None:
        """Continue after the step that `state` was taken at, with any number of replicas, workers and packs per step.

        Raises DataError when the state belongs to other data.
        """
        for field, here, hint in (
            ("groups", self._names, "resume with the same groups in the same order"),
            ("num_rows", self._num_rows, "resume with the same files"),
        ):
            if state[field] != here:
                raise DataError(
                    f"the saved data state has {field} {state[field]}, this run has {here}; {hint}, "
                    "or start a new run from the checkpoint's weights."
                )
        self._discard()
        state = copy.deepcopy(state)
        self._faults.load_state_dict(state["faults"])
        self._judge.load_state_dict(state["faults"])
        self._plan_state = {name: state[name] for name in self._plan_state}
        lost = self._planner.load_state(self._plan_state)
        if lost:
            self._plan_state = self._planner.state()
            self._record_late(lost)

    def fault_counts(self) -> dict[str, dict[str, int]]:
        """Skipped rows and files up to the last step handed out: group -> kind -> number."""
        return self._faults.counts()

    def close(self) -> None:
        """End the workers."""
        self._pool.close()
        if self._assembly is not None:
            self._assembly.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _weigh(self, sample: PlannedSample) -> tuple[int, int, int]:
        cost = sample.num_tokens if self._cost_model is None else self._cost_model.cost(sample)
        known = self._known[sample.key[0]] if self._known else None
        return sample.num_tokens, cost, pixel_bytes(sample, self._geometry, known)

    def _plan(self) -> None:
        """Plan one more step and begin to read it, unless there is none."""
        if self._stop is not None:
            return
        step = self._planner.next_step()
        if step.stop is not None:
            self._stop = step
            return
        self._steps.append(_Ahead(step, self._read(step)))

    def _plan_ahead(self) -> None:
        """Plan on while the pictures that wait stay below the limit; always the step after the next one.

        Every replica decides by the fullest one, so that all plan the same.
        """
        if self._assembly is None:  # nothing is read before it is asked for
            return
        for _ in range(NEW_STEPS):
            waiting = [sum(step) for step in zip(*(ahead.step.num_bytes for ahead in self._steps), strict=True)]
            full = max(waiting) >= self._most_bytes or len(self._steps) > MAX_STEPS_AHEAD
            if full and len(self._steps) > 1:
                return
            self._plan()

    def _read(self, step: PlannedStep) -> Callable[[], tuple[list[Pack], Late]]:
        """Begin to read this replica's pictures of the step; a function that waits for its packs."""
        own = step.packs[self._rank]
        plans = {sample: self._stream.take(sample) for packs in step.packs for pack in packs for sample in pack}
        wanted = [[(s, self._pool.submit("load", s.group_index, s.position, plans[s])) for s in pack] for pack in own]
        assemble = partial(self._assemble, wanted)
        return assemble if self._assembly is None else self._assembly.submit(assemble).result

    def _assemble(self, wanted: list[list[tuple[Measured, Future]]]) -> tuple[list[Pack], Late]:
        """The packs. A sample that cannot be read after all leaves its pack."""
        packs: list[Pack] = []
        late: Late = []
        for pack in wanted:
            samples = []
            for measured, future in pack:
                sample = future.result()
                if isinstance(sample, Fault):
                    late.append((measured.group_index, sample))
                else:
                    samples.append(sample)
            packs.append(self._make_pack(samples))
        return packs, late

    def _record(self, step: PlannedStep) -> None:
        self._plan_state = step.state
        for group, fault in step.draws:
            name = self._names[group]
            if fault is None:
                self._faults.good(name)
            else:
                self._faults.bad(name, fault)

    def _record_late(self, late: Late) -> None:
        for group, fault in late:
            for log in (self._faults, self._judge):
                log.late(self._names[group], fault)

    def _end(self) -> list[Pack]:
        """Raise what ended the planning; the rows that were drawn for nothing count once."""
        stop, self._stop.draws = copy.copy(self._stop), []
        self._record(stop)
        raise stop.stop

    def _discard(self) -> None:
        """Forget what was planned and read ahead."""
        self._steps.clear()
        self._stop = None
