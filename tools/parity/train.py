"""The case on these ranks: the real model, wrapping, schedule, optimizer and moving average, fed with saved values.

Collects forward values, gradients and the state after the trajectory on rank 0; judging them is `judge.py`'s matter.
"""

from dataclasses import dataclass

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megabagel.checkpoint.hf import load_weights, open_source
from megabagel.config.schema import Config
from megabagel.models.build import build_stages
from megabagel.models.embeddings import StreamInputs
from megabagel.models.vision import is_frozen
from megabagel.packing.chunk import chunk_of
from megabagel.packing.plan import PackPlan
from megabagel.runtime.distributed import Layout
from megabagel.runtime.overlap import whole_parameters
from megabagel.training.ema import ShardedEma
from megabagel.training.optimizer import build_optimizer
from megabagel.training.step import Losses, count, forward_backward
from megabagel.training.wrap import wrap
from parity.case import Case, latent_pictures
from parity.gather import Rows, export, gather, gather_gradient_shards, gather_rows, gather_tensors
from parity.infer import InferValues, is_for_inference, run_inference
from parity.measure import Recorder, forward_values, own_vit_tokens
from parity.plans import Share, make_shares

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

    rows: Rows
    losses: Losses
    gradients: dict[str, list[Tensor]]
    steps: list[StepValues]
    initial: dict[str, list[Tensor]]
    final: dict[str, list[Tensor]]
    ema: dict[str, list[Tensor]]
    inference: InferValues | None  # None on a layout that is not for inference


class Runner:
    """One rank's part of the case."""

    def __init__(self, case: Case, config: Config, layout: Layout):
        self.case, self.config, self.layout = case, config, layout
        self.stages = build_stages(config, layout.device)
        source = open_source(config)
        load_weights(self.stages, source)
        source.close()
        self.inference = run_inference(case, self.stages[0]) if is_for_inference(config.parallel) else None
        self.chunks = wrap(self.stages, config.parallel)
        tile = TILE * layout.tp_size * layout.cp_size
        self.shares = make_shares(case, layout.dp_rank, layout.dp_size, layout.pp_size, tile)
        self.latents = latent_pictures(case, config.model)
        self.counts = count([share.plan for share in self.shares], config.training, layout.device)

    def run(self) -> Results | None:
        """One recorded step without update, then the trajectory. None except on rank 0."""
        expected = self.case.expected
        optimizer = build_optimizer(self.config.optimizer, self.config.training, self.config.parallel, self.chunks)
        ema = ShardedEma(optimizer)
        initial = self._weights()
        recorder = Recorder(self.shares).attach(self.stages)
        inputs = self._inputs(expected.get("fwd.noise"))
        losses = self._forward_backward(inputs)
        recorder.detach()
        parts = zip(recorder.rows, self.shares, inputs, strict=True)
        rows = gather_rows([forward_values(recorded, *of_share, self.stages[0]) for recorded, *of_share in parts])
        gather_gradient_shards(self.chunks)
        trained = [{n: p for n, p in stage.named_parameters() if p.requires_grad} for stage in self.stages]
        gradients = export(self.stages, [{n: p.main_grad for n, p in of_stage.items()} for of_stage in trained])
        gradients = gather_tensors(gradients)

        steps = []
        for noise in expected.get("traj.noise", []):
            self._zero_gradients(optimizer)
            step_losses = self._forward_backward(self._inputs(noise))
            _, grad_norm, _ = optimizer.step()
            ema.update(self.config.optimizer.ema_decay)
            steps.append(StepValues(step_losses.ce, step_losses.mse, float(grad_norm)))
        with whole_parameters(self.chunks):
            final = self._weights()
        with ema.applied():
            averaged = self._weights()
        # the losses are known on the last stage only, whose ranks are the last ones of the world
        reports = gather((losses, steps))
        if reports is None:
            return None
        losses, steps = reports[-1]
        return Results(rows, losses, gradients, steps, initial, final, averaged, self.inference)

    def _weights(self) -> dict[str, list[Tensor]] | None:
        return gather_tensors(export(self.stages, [dict(stage.named_parameters()) for stage in self.stages]))

    def _zero_gradients(self, optimizer: MegatronOptimizer) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()

    def _inputs(self, noise: Tensor | None) -> list[StreamInputs]:
        """Of every micro-batch; `noise` [Nl, d] of the whole case, None where it has no latents."""
        return [self._inputs_of(share, noise) for share in self.shares]

    def _inputs_of(self, share: Share, noise: Tensor | None) -> StreamInputs:
        batch, vit, device = self.case.batch, self.config.model.vit, self.layout.device
        patches = batch["packed_vit_tokens"][share.vit] if len(share.vit) else torch.empty(0, 3 * vit.patch_size**2)
        latents = self.latents[share.latent]
        noise = noise[share.latent] if len(share.latent) else torch.empty_like(latents)
        patches, latents, noise = patches.to(device), latents.flatten().to(device), noise.to(device)
        if not (is_frozen(self.config.model) and self.stages[0].pre_process and self.stages[0].vision is not None):
            return StreamInputs(patches[own_vit_tokens(share, self.stages[0]).to(device)], latents, noise)
        return StreamInputs(None, latents, noise, self._frozen_features(share.plan, patches))

    @torch.no_grad()
    def _frozen_features(self, plan: PackPlan, patches: Tensor) -> Tensor:
        """What the encode phase hands to the first stage: features of the ViT tokens of this rank's chunk."""
        if not len(patches):
            return patches.new_empty(0, self.config.model.vit.hidden_size)
        features = self.stages[0].vision(patches, plan.vit_position_ids.to(patches.device), plan.vit_seqlens.tolist())
        return features[chunk_of(plan, self.layout.cp_rank, self.layout.cp_size).vit_tokens]

    def _forward_backward(self, inputs: list[StreamInputs]) -> Losses:
        plans = [share.plan for share in self.shares]
        rows = plans[0].und_length + plans[0].gen_length
        batches = list(zip(plans, inputs, strict=True))
        return forward_backward(self.chunks, batches, self.counts, self.config.training, rows)
