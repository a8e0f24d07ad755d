"""Losses on held-out packs, the same ones with the same noise each time, of the live weights or of their average.

Forward only: weights, gradients, generators and the place in the training data stay as they are. When to validate and
what follows from it is the training loop's matter; what is read is `held_out.py`'s.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megabagel.config.errors import ConfigError
from megabagel.config.schema import Config
from megabagel.data.broadcast import ReplicaReader
from megabagel.data.faults import DataError
from megabagel.data.steps import EndOfData
from megabagel.models.embeddings import StreamInputs
from megabagel.models.fp8_history import forgotten
from megabagel.models.heads import ChunkLosses
from megabagel.packing.plan import PackPlan
from megabagel.runtime.distributed import Layout
from megabagel.runtime.overlap import whole_parameters
from megabagel.training.ema import ShardedEma
from megabagel.training.encode import Encoder
from megabagel.training.loss_table import LossTable, metric_names

LIVE, AVERAGE = "validation/", "validation/ema/"  # before the names of `metric_names`
SECONDS = "validation/seconds"  # that a validation took
MicroBatch = tuple[PackPlan, StreamInputs | None, list[str]]  # with the group of each sample


class Validation:
    """`measure` at any time between two steps, on every rank. `reader` and `encoder` are its own."""

    def __init__(
        self,
        config: Config,
        layout: Layout,
        stages: list[nn.Module],
        ema: ShardedEma | None,
        reader: ReplicaReader,
        encoder: Encoder,
        rows: int,
    ) -> None:
        """`rows`: as of the trainer. Raises ConfigError when nothing measured here has the name
        `checkpoint.best_metric` and something depends on it."""
        self._config, self._layout, self._stages, self._ema = config, layout, stages, ema
        self._reader, self._encoder, self._rows = reader, encoder, rows
        self._start = reader.state_dict()
        self._groups: list[str] = self._start["groups"]
        depends = config.validation.patience is not None or config.checkpoint.keep_best is not None
        if depends and config.checkpoint.best_metric not in self.names:
            raise ConfigError(
                f"checkpoint.best_metric is {config.checkpoint.best_metric}, which no validation measures; allowed are "
                f"{', '.join(self.names)}."
            )

    @property
    def names(self) -> list[str]:
        """Of what `measure` returns, the time that it takes left out."""
        weights = self._config.validation.weights
        prefixes = {"model": [LIVE], "ema": [AVERAGE], "both": [LIVE, AVERAGE]}[weights]
        return [prefix + name for prefix in prefixes for name in metric_names(self._groups)]

    def measure(self) -> dict[str, float | None]:
        """Of all `names`, equal on every rank; None where no held-out row carries that loss."""
        start, values = time.perf_counter(), {}
        weights = self._config.validation.weights
        if weights != "ema":
            with whole_parameters(self._stages):
                values |= {LIVE + name: value for name, value in self._losses().items()}
        if weights != "model":
            with self._ema.applied():
                values |= {AVERAGE + name: value for name, value in self._losses().items()}
        return values | {SECONDS: time.perf_counter() - start}

    def close(self) -> None:
        """End the reader's workers."""
        self._reader.close()

    def _losses(self) -> dict[str, float | None]:
        """Of the present weights."""
        config = self._config
        table = LossTable(self._groups, config.model.timestep_shift, self._layout, config.parallel.sequence_parallel)
        # bad rows are counted and listed over all passes, so that each is logged once
        self._reader.load_state_dict({**self._start, "faults": self._reader.state_dict()["faults"]})
        with _evaluating(self._stages), forgotten(self._stages):
            for packs in self._steps():
                inputs = self._encoder(packs)
                groups = [pack.groups for pack in packs]
                micro_batches = list(zip([pack.plan for pack in packs], inputs, groups, strict=True))
                forward_only(self._stages, micro_batches, self._rows, table.add)
        table.reduce()
        values = table.values(config.training)
        if values["loss"] is None:
            raise DataError(
                f"held-out data {config.validation.dataset_config_file}: no sample has a token to be learnt; give "
                "others, or set validation.interval to 0."
            )
        return values

    def _steps(self) -> Iterator[list]:
        while True:
            try:
                yield self._reader.next_step()
            except EndOfData:
                return
            except DataError as error:
                raise DataError(f"held-out data {self._config.validation.dataset_config_file}: {error}") from None


def forward_only(
    stages: list[nn.Module],
    micro_batches: list[MicroBatch],
    rows: int,
    look: Callable[[PackPlan, Sequence[str], ChunkLosses], None],
) -> None:
    """Run all micro-batches through the pipeline without gradients; `look` gets the losses of each on the last stage.

    `rows`: see `step.forward_backward`.
    """

    def forward_step(batches: Iterator[MicroBatch], stage: nn.Module):
        plan, inputs, groups = next(batches)

        def report(losses: ChunkLosses) -> tuple[Tensor, Tensor, dict]:
            look(plan, groups, losses)
            return losses.ce, torch.zeros((), dtype=torch.int, device=losses.ce.device), {}

        return stage(plan, inputs), report

    config = stages[0].config
    # the schedules of pipelines would enter this context and leave it to the garbage collector, which may end it in the
    # middle of a training step
    no_sync, config.no_sync_func = config.no_sync_func, None
    try:
        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(micro_batches) for _ in stages] if len(stages) > 1 else iter(micro_batches),
                model=stages,
                num_microbatches=len(micro_batches),
                seq_length=rows,
                micro_batch_size=1,
                forward_only=True,
            )
    finally:
        config.no_sync_func = no_sync


@contextlib.contextmanager
def _evaluating(stages: list[nn.Module]) -> Iterator[None]:
    """Inside, nothing is prepared for a backward pass."""
    for stage in stages:
        stage.eval()
    try:
        yield
    finally:
        for stage in stages:
            stage.train()
