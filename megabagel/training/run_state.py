"""What of a run outlives it: all that a checkpoint holds, with when and how it is saved, continued and gone back to.

It knows nothing of batches, losses or logs; `loop.py` trains on top of it.
"""

from dataclasses import dataclass, field

from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megabagel.checkpoint import distributed as checkpoint
from megabagel.checkpoint import folder
from megabagel.checkpoint.local import LocalStore
from megabagel.checkpoint.retention import Keep
from megabagel.checkpoint.saver import Saver
from megabagel.config.load import to_yaml
from megabagel.config.schema import Config
from megabagel.data.broadcast import ReplicaReader
from megabagel.runtime.distributed import Layout
from megabagel.runtime.progress import Progress
from megabagel.training.best import Best
from megabagel.training.ema import ShardedEma
from megabagel.training.nonfinite import NonfiniteSteps
from megabagel.training.spikes import Spikes


@dataclass
class RunState:
    """One rank's part of a run. `stages` are wrapped in megatron-core's DistributedDataParallel."""

    config: Config
    layout: Layout
    stages: list[nn.Module]
    optimizer: MegatronOptimizer
    ema: ShardedEma | None
    reader: ReplicaReader
    local: LocalStore | None = None  # of this rank's fast checkpoints
    progress: Progress = field(default_factory=Progress)
    step: int = 0
    samples: int = 0
    measured: dict[str, float | None] = field(default_factory=dict)  # by the validation after the last step, if any

    def __post_init__(self) -> None:
        run_dir, faults = self.config.checkpoint.run_dir, self.config.faults
        self.best = Best(self.config.checkpoint.best_metric, self.config.validation.patience)
        self.nonfinite = NonfiniteSteps(run_dir, faults.nonfinite_patience, self.layout)
        self.spikes = Spikes(run_dir, faults, self.layout)
        self.saver = Saver(self.config.checkpoint.async_save, Keep.of(self.config.checkpoint))

    def save_is_due(self) -> bool:
        """Whether a checkpoint belongs after the last step."""
        interval = self.config.checkpoint.save_interval
        return interval > 0 and (self.step % interval == 0 or self.step == self.config.training.train_steps)

    def local_save_is_due(self) -> bool:
        """Whether this rank's own, fast checkpoint does."""
        return self.local is not None and self.step % self.config.checkpoint.local_save_interval == 0

    def save(self) -> None:
        """Write the whole state of the run; it is on disk when this returns. Every rank must call it."""
        self.start_save()
        self.saver.wait()

    def start_save(self) -> None:
        """As `save`, but with `checkpoint.async_save` only the copying is waited for, see `Saver`."""
        self.progress.mark(self.step, "saving")
        metrics = {name: value for name, value in self.measured.items() if value is not None}
        checkpoint.save(self.config.checkpoint.run_dir, **self._state(), metrics=metrics)

    def start_local_save(self) -> None:
        """As `start_save`, but each rank writes what it holds itself to a disk of its own."""
        self.progress.mark(self.step, "saving")
        checkpoint.save_locally(self.local, **self._state())

    def _state(self) -> dict:
        """What is saved; every rank must call it."""
        return {
            "step": self.step,
            "model_chunks": self.stages,
            "optimizer": self.optimizer,
            "ema": self.ema,
            "data_state": self.reader.state_dict(),
            "counters": {"samples": self.samples, **self.best.state_dict(), **self.nonfinite.state_dict()},
            "config_yaml": to_yaml(self.config),
            "watched": self.spikes.state_dict(),
            "saver": self.saver,
        }

    def resume(self) -> bool:
        """Continue from the newest checkpoint of the run folder; False when there is none."""
        state = self._load()
        if state is None:
            return False
        self.step, self.samples = state.step, state.counters["samples"]
        self.best.load_state_dict(state.counters)
        self.nonfinite.load_state_dict(state.counters)
        self.spikes.load_state_dict(state.watched)
        self.reader.load_state_dict(state.data_state)
        self.say(f"continuing after step {self.step} from {state.folder}")
        return True

    def roll_back(self) -> bool:
        """Go back to the last checkpoint before this step, or to the one before that when that has not helped.

        The data go on where they are. The checkpoint is written again, so that a new start does the same. False, and
        nothing happens, when there is none. Every rank must call it.
        """
        self.progress.mark(self.step, "going back")
        self.saver.wait()
        step, samples = self.step, self.samples
        state = self._load(before=step)
        if state is not None and state.step == self.spikes.rolled_back_to:
            state = self._load(before=state.step) or state
        if state is None:
            self.say(f"there is no checkpoint before step {step}: the run goes on")
            return False
        self.step, self.samples = state.step, state.counters["samples"]
        self.best.load_state_dict(state.counters)
        self.spikes.load_windows(state.watched)
        self.spikes.went_back(step, self.step, samples - self.samples)
        self.say(
            f"going back to the weights after step {self.step} from {state.folder}; the {samples - self.samples} "
            "samples since then are left out"
        )
        self.measured = folder.metrics_of(state.folder)
        self.start_save()
        if self.local:  # those ahead belong to what is left behind
            self.start_local_save()
        return True

    def _load(self, before: int | None = None) -> checkpoint.RunState | None:
        wanted = self.config.checkpoint
        return checkpoint.load(
            wanted.run_dir, self.stages, self.optimizer, self.ema, verify=wanted.verify, local=self.local, before=before
        )

    def say(self, message: str) -> None:
        """On the console, once."""
        if self.layout.rank == 0:
            print(message, flush=True)
