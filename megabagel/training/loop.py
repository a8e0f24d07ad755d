"""The training loop of one rank: read, encode, step, average, watch, validate, save.

It only calls the pieces in order; `setup.py` puts them together and none of them knows of the loop.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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
from megabagel.data.faults import log_values
from megabagel.data.pack import BLANK
from megabagel.data.steps import EndOfData
from megabagel.runtime.distributed import Layout
from megabagel.runtime.progress import Progress
from megabagel.training import histograms
from megabagel.training.best import Best
from megabagel.training.ema import ShardedEma
from megabagel.training.encode import Encoder
from megabagel.training.expert_losses import take_expert_losses
from megabagel.training.metrics import MetricsWriter
from megabagel.training.nonfinite import NonfiniteSteps, finite_or_none
from megabagel.training.optimizer import set_learning_rate, update
from megabagel.training.samples import Sample, Sampling
from megabagel.training.schedule import lr_at
from megabagel.training.spikes import Spikes
from megabagel.training.step import count, forward_backward
from megabagel.training.step_content import content_of
from megabagel.training.step_values import at_hand, gathered, not_gathered
from megabagel.training.stopping import Stop
from megabagel.training.stragglers import Stragglers
from megabagel.training.task_losses import TaskLosses
from megabagel.training.validation import Validation


class End(NamedTuple):
    """Why a run has ended, by the names of `runtime.outcome`, and whether a checkpoint has all that it did."""

    reason: str
    saved: bool


@dataclass
class Trainer:
    """What one rank needs to train. `stages` are wrapped in megatron-core's DistributedDataParallel."""

    config: Config
    layout: Layout
    stages: list[nn.Module]
    optimizer: MegatronOptimizer
    ema: ShardedEma | None
    reader: ReplicaReader
    encoder: Encoder
    rows: int  # padded rows of every pack: the length that travels between pipeline stages
    validation: Validation | None = None
    sampling: Sampling | None = None
    local: LocalStore | None = None  # of this rank's fast checkpoints
    stop: Stop | None = None  # who may ask for an early end; None: nobody
    progress: Progress = field(default_factory=Progress)
    step: int = 0
    samples: int = 0
    measured: dict[str, float | None] = field(default_factory=dict)  # by the validation after the last step, if any

    def __post_init__(self) -> None:
        self.best = Best(self.config.checkpoint.best_metric, self.config.validation.patience)
        run_dir, faults = self.config.checkpoint.run_dir, self.config.faults
        self.nonfinite = NonfiniteSteps(run_dir, faults.nonfinite_patience, self.layout)
        self.spikes = Spikes(run_dir, faults, self.layout)
        self.stragglers = Stragglers(self.stages, self.layout, run_dir, self.config.logging)
        self.saver = Saver(self.config.checkpoint.async_save, Keep.of(self.config.checkpoint))

    def run(self) -> End:
        """Train up to `training.train_steps`, to the end of the data or until asked to stop; then save."""
        config = self.config
        writer = None
        if self.layout.is_last_stage_writer:
            writer = MetricsWriter(
                Path(config.checkpoint.run_dir), config, start_step=self.step, train_steps=config.training.train_steps
            )
        try:
            reason, saved, longest = "done", self.step, 0.0
            while self.step < config.training.train_steps:
                if self.best.is_exhausted:
                    self._say(f"training ends after step {self.step}: {self.best.sentence()}")
                    reason = "early_stop"
                    break
                if self.stop and (asked := self.stop.agreed(longest + self.saver.longest)):
                    is_kept = config.checkpoint.save_interval > 0
                    kept = "its state is saved" if is_kept else "nothing is saved, as checkpoint.save_interval is 0"
                    self._say(f"training stops after step {self.step}: {asked.text}; {kept}")
                    reason = asked.kind
                    break
                try:
                    values = self.train_step()
                except EndOfData as end:
                    self._say(f"the data end after step {self.step}: {end}")
                    reason = "data_end"
                    break
                longest = max(longest, values["step_time"])
                self.saver.check()
                values |= self.stragglers.report(self.step, values)
                spike = self.spikes.look(self.step, values)
                values |= self.spikes.values()
                if spike and self.roll_back():
                    if writer:
                        writer.write(spike, values)
                        writer.rewind(self.step)
                    saved = self.step
                    continue
                self.validate()
                samples, sizes = self.make_samples(), self.measure_sizes()
                if self._save_is_due():
                    self.start_save()
                    saved = self.step
                elif self._local_save_is_due():
                    self.start_local_save()
                if self.step == config.training.train_steps:
                    self.progress.mark(self.step, "saving")
                    self.saver.wait()
                if writer:
                    writer.write(self.step, values | self.measured | self.saver.take_times())
                    writer.write_samples(self.step, samples)
                    writer.write_histograms(self.step, sizes)
            if config.checkpoint.save_interval and saved < self.step:
                self.start_save()
                saved = self.step
            self.progress.mark(self.step, "saving")
            self.saver.wait()
            self.reader.close()  # not after a failure: waiting for workers would delay its announcement
            if self.validation:
                self.validation.close()
        finally:
            if writer:
                writer.close()
        return End(reason, saved == self.step)

    def train_step(self) -> dict[str, float | None]:
        """One update; the values that the log shows (losses are None except on the last stage). Raises EndOfData."""
        config, start = self.config, time.perf_counter()
        self.progress.mark(self.step, "reading data")
        packs = self.reader.next_step()
        read = time.perf_counter()
        plans, contents = [pack.plan for pack in packs], content_of(packs, config.model)
        blanks = sum(pack.groups.count(BLANK) for pack in packs)
        counts = count(plans, config.training, self.layout.device, blanks, contents)
        self.progress.mark(self.step, "encoding pictures")
        inputs = self.encoder(packs)
        encoded = time.perf_counter()
        self.progress.mark(self.step, "in forward and backward")
        for stage in self.stages:
            stage.zero_grad_buffer()
        self.optimizer.zero_grad()
        is_shown = (self.step + 1) % config.logging.log_interval == 0
        tasks = TaskLosses(self.reader.state_dict()["groups"], packs, config, self.layout)
        micro_batches = list(zip(plans, inputs, strict=True))
        self.stragglers.start()
        losses = forward_backward(
            self.stages, micro_batches, counts, config.training, self.rows, tasks if is_shown else None
        )
        packs_of_step = config.training.global_batch_size
        expert_losses = take_expert_losses(self.stages, config.model, packs_of_step, self.layout.device)
        lr = lr_at(self.step, config.optimizer, config.training.train_steps)
        set_learning_rate(self.optimizer, lr)
        self.progress.mark(self.step, "updating weights")
        grad_norm = update(self.optimizer, losses.are_finite)
        if not math.isfinite(grad_norm):
            self.nonfinite.failed(self.step + 1, self.stages, packs, losses.of_packs, to_yaml(config))
        else:
            self.nonfinite.passed()
            if self.ema:
                self.ema.update(config.optimizer.ema_decay)
        self.step += 1
        self.samples += counts.samples
        end = time.perf_counter()
        times = {"step_time": end - start, "data_time": read - start, "encode_time": encoded - read}
        closely = not_gathered()
        if is_shown:
            closely = gathered(config, self.layout, self.optimizer, self.ema, grad_norm)
        values = {
            **at_hand(config, self.layout, counts, contents, losses, times),
            **tasks.values(),
            **closely,
            "moe_aux_loss": expert_losses.balance,
            "moe_z_loss": expert_losses.z,
            "lr": lr,
            "grad_norm": grad_norm,
            "nonfinite_steps": self.nonfinite.total,
            "samples_seen": self.samples,
            "encode_balance": self.encoder.balance,
            **log_values(self.reader.state_dict()["faults"]),
        }
        return {name: finite_or_none(value) for name, value in values.items()}

    def validate(self) -> None:
        """Measure the held-out losses if it is time to; every rank must call it."""
        self.measured, interval = {}, self.config.validation.interval
        if self.validation and (self.step % interval == 0 or self.step == self.config.training.train_steps):
            self.progress.mark(self.step, "validating")
            self.measured = self.validation.measure()
            self.best.update(self.step, self.measured)

    def make_samples(self) -> list[Sample]:
        """Let the model answer the requests of `config.samples` if it is time to; every rank must call it."""
        interval, is_last = self.config.samples.interval, self.step == self.config.training.train_steps
        return self.sampling.make(self.step) if self.sampling and (self.step % interval == 0 or is_last) else []

    def measure_sizes(self) -> dict[str, histograms.Histogram]:
        """Histograms of gradients and parameters if it is time to; every rank must call it."""
        interval = self.config.logging.histogram_interval
        if not interval or self.step % interval:
            return {}
        return histograms.measure(self.optimizer, self.config.model.layer_variant)

    def _save_is_due(self) -> bool:
        interval = self.config.checkpoint.save_interval
        return interval > 0 and (self.step % interval == 0 or self.step == self.config.training.train_steps)

    def _local_save_is_due(self) -> bool:
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
        self._say(f"continuing after step {self.step} from {state.folder}")
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
            self._say(f"there is no checkpoint before step {step}: the run goes on")
            return False
        self.step, self.samples = state.step, state.counters["samples"]
        self.best.load_state_dict(state.counters)
        self.spikes.load_windows(state.watched)
        self.spikes.went_back(step, self.step, samples - self.samples)
        self._say(
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

    def _say(self, message: str) -> None:
        if self.layout.rank == 0:
            print(message, flush=True)
