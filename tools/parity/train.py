"""The case on these ranks: the real model, wrapping, schedule, optimizer and moving average, fed with saved values.

Collects forward values, gradients and the state after the trajectory on rank 0; judging them is `judge.py`'s matter.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megabagel.checkpoint.hf import load_weights, open_source
from megabagel.config.schema import Config
from megabagel.models.bagel import Bagel
from megabagel.models.build import build_stage
from megabagel.models.embeddings import StreamInputs
from megabagel.runtime.distributed import Layout
from megabagel.training.ema import ShardedEma
from megabagel.training.optimizer import build_optimizer
from megabagel.training.step import Losses, count, forward_backward
from megabagel.training.wrap import wrap
from parity.case import Case, CaseError, latent_tokens
from parity.measure import Recorder, export, forward_values, gather, gather_rows, gather_tensors
from parity.plans import Share, make_share

TILE = 16


@dataclass
class StepValues:
    """Global losses and gradient norm of a step, before its update."""

    ce: float | None
    mse: float | None
    grad_norm: float


@dataclass
class Results:
    """What rank 0 has to compare; tensors by released name hold every copy that the ranks have."""

    rows: dict[str, dict[int, list[tuple[Tensor, Tensor]]]]
    losses: Losses
    gradients: dict[str, list[Tensor]]
    steps: list[StepValues]
    initial: dict[str, list[Tensor]]
    final: dict[str, list[Tensor]]
    ema: dict[str, list[Tensor]]


class Runner:
    """One rank's part of the case."""

    def __init__(self, case: Case, config: Config, layout: Layout):
        if layout.dp_size > case.samples:
            raise CaseError(f"the case has {case.samples} samples, too few for {layout.dp_size} data-parallel replicas")
        self.case, self.config, self.layout = case, config, layout
        self.stage: Bagel = build_stage(config, layout.device)
        source = open_source(config)
        load_weights(self.stage, source)
        source.close()
        self.chunks = wrap([self.stage], config.parallel)
        samples = list(range(case.samples))[layout.dp_rank :: layout.dp_size]
        self.share: Share = make_share(case, samples, config.parallel.tensor_model_parallel_size * TILE)
        self.latents = latent_tokens(case, config.model)[self.share.latent]
        plan = self.share.plan
        self.counts = count([plan], config.training, layout.device)

    def run(self) -> Results | None:
        """One recorded step without update, then the trajectory. None except on rank 0."""
        expected = self.case.expected
        recorder = Recorder().attach(self.stage)
        inputs = self._inputs(expected.get("fwd.noise"))
        losses = self._forward_backward(inputs)
        recorder.detach()
        captured = forward_values(recorder, self.share, inputs, self.stage)
        rows = gather_rows(captured)
        gather_gradient_shards(self.chunks[0])
        parameters = dict(self.stage.named_parameters())
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        gradients = gather_tensors(export(self.stage, {name: p.main_grad for name, p in trained.items()}))
        initial = gather_tensors(export(self.stage, parameters))

        optimizer = build_optimizer(self.config.optimizer, self.config.training, self.config.parallel, self.chunks)
        ema = ShardedEma(optimizer)
        steps = []
        for noise in expected.get("traj.noise", []):
            self.chunks[0].zero_grad_buffer()
            optimizer.zero_grad()
            step_losses = self._forward_backward(self._inputs(noise))
            _, grad_norm, _ = optimizer.step()
            ema.update(self.config.optimizer.ema_decay)
            steps.append(StepValues(step_losses.ce, step_losses.mse, float(grad_norm)))
        final = gather_tensors(export(self.stage, parameters))
        with ema.applied():
            averaged = gather_tensors(export(self.stage, parameters))
        # the losses are known on the last stage only, whose ranks are the last ones of the world
        reports = gather((losses, steps))
        if reports is None:
            return None
        losses, steps = reports[-1]
        return Results(rows, losses, gradients, steps, initial, final, averaged)

    def _inputs(self, noise: Tensor | None) -> StreamInputs:
        batch, share, vit = self.case.batch, self.share, self.config.model.vit
        patches = batch["packed_vit_tokens"][share.vit] if len(share.vit) else torch.empty(0, 3 * vit.patch_size**2)
        noise = noise[share.latent] if len(share.latent) else torch.empty_like(self.latents)
        device = self.layout.device
        return StreamInputs(patches.to(device), self.latents.to(device), noise.to(device))

    def _forward_backward(self, inputs: StreamInputs) -> Losses:
        plan = self.share.plan
        rows = plan.und_length + plan.gen_length
        batch = [(plan, inputs)]
        return forward_backward(self.chunks, batch, self.counts, self.config.training, rows)


def gather_gradient_shards(chunk: DistributedDataParallel) -> None:
    """Complete the gradient buffers, of which the distributed optimizer's reduction fills this rank's shard only."""
    for buffer in chunk.buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
