"""Collects what a step of the real training code computed inside on this rank, by hooks on the modules.

Putting the ranks' parts together is `gather.py`'s matter.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megabagel.models.bagel import Bagel
from megabagel.models.embeddings import StreamInputs
from megabagel.models.flow import flow_tokens
from megabagel.models.vision_spread import image_owners
from megabagel.packing.chunk import chunk_of
from megabagel.packing.plan import PackPlan
from parity.plans import Share

# name -> places of the rows in the saved order, rows
Captured = dict[str, tuple[Tensor, Tensor]]


@dataclass
class Recorder:
    """Forward hooks on this rank's stages; `rows` holds, per micro-batch, each hooked module's outputs in the order of
    its calls. What runs outside of a stage's forward pass (recomputation) is not recorded.
    """

    shares: list[Share]
    rows: list[dict[str, list[Tensor]]] = field(default_factory=list)
    handles: list = field(default_factory=list)
    current: int | None = None  # micro-batch whose forward pass runs

    def attach(self, stages: list[Bagel]) -> "Recorder":
        self.rows = [defaultdict(list) for _ in self.shares]
        for stage in stages:
            self._attach(stage)
        return self

    def _attach(self, stage: Bagel) -> None:
        self.handles += [stage.register_forward_pre_hook(self._begin), stage.register_forward_hook(self._end)]
        if stage.pre_process:
            self._watch("llm_input", stage.embeddings)
            if stage.vision is not None:
                self._watch("vit_last_hidden", stage.vision)
                self._watch("vit_connector_out", stage.embeddings.und.connector)
            if stage.embeddings.gen is not None:
                self._watch("timestep_embeds", stage.embeddings.gen.time_embedder)
                self._watch("timesteps", stage.embeddings.gen.time_embedder, inputs=True)
        for layer in stage.decoder.layers:
            self._watch(f"layer_out.{layer.layer_number - 1}", layer)
        if stage.post_process:
            # the dense variant calls one norm twice: und rows, then gen rows, as with two norms
            for norm in {id(n): n for n in (stage.heads.und_norm, stage.heads.gen_norm) if n is not None}.values():
                self._watch("final", norm)
            self._watch("losses", stage.heads)
            if stage.heads.llm2vae is not None:
                self._watch("velocity", stage.heads.llm2vae)

    def _begin(self, _: nn.Module, args: tuple) -> None:
        (self.current,) = [number for number, share in enumerate(self.shares) if share.plan is args[0]]

    def _end(self, *_: object) -> None:
        self.current = None

    def _watch(self, name: str, module: nn.Module, inputs: bool = False) -> None:
        def hook(_, args, output):
            value = args[0] if inputs else output
            if isinstance(value, tuple) and name != "losses":
                value = value[0]
            if self.current is not None:
                self.rows[self.current][name].append(value if name == "losses" else value.detach().clone())

        self.handles.append(module.register_forward_hook(hook))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()


def forward_values(recorded: dict[str, list[Tensor]], share: Share, inputs: StreamInputs, stage: Bagel) -> Captured:
    """The recorded rows of one micro-batch without padding, with their places in the saved order.

    `stage`: any of this rank's. Streams are those of this rank's context-parallel chunk.
    """
    plan, out = share.plan, {}
    chunk = chunk_of(plan, stage.cp_rank, stage.cp_size)
    first = stage.cp_rank * chunk.und_length
    und_places = share.positions[plan.und_index[first : first + chunk.und_length]]
    gen_places = share.positions[plan.gen_index[chunk.latents]]
    ce = share.ce[_inside(plan.ce_rows, first, chunk.und_length)]
    mse_inside = _inside(plan.mse_rows, stage.cp_rank * chunk.gen_length, chunk.gen_length)
    mse = share.mse[mse_inside]

    def streams(und_rows: Tensor, gen_rows: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([und_places, gen_places]), torch.cat(
            [und_rows[: len(und_places)], gen_rows[: len(gen_places)]]
        )

    if inputs.vit_features is not None:
        out["vit_last_hidden"] = share.vit[chunk.vit_tokens], inputs.vit_features
    for name, calls in recorded.items():
        value = calls[0]
        if name == "llm_input" or name.startswith("layer_out."):
            out[name] = streams(*_whole_streams(value[:, 0], stage, chunk.und_length, chunk.gen_length))
        elif name == "final":
            out["last_hidden_state"] = streams(
                *_whole_streams(torch.cat(calls), stage, chunk.und_length, chunk.gen_length)
            )
        elif name == "vit_last_hidden":
            own = own_vit_tokens(share, stage)
            out[name] = share.vit[own], value[: len(own)]
        elif name == "vit_connector_out":
            out[name] = share.vit[chunk.vit_tokens], value[: len(chunk.vit_tokens)]
        elif name in ("timesteps", "timestep_embeds"):
            out[name] = share.latent[chunk.latents], value[: len(gen_places)]
        elif name == "losses":
            out["ce"] = ce, value.ce_rows
            out["mse_mean"] = mse, _all_rows(value.mse_rows, stage)
        elif name == "velocity":
            target = _target(plan, inputs, stage)[plan.mse_rows[mse_inside]]
            out["mse"] = mse, (_all_rows(value, stage) - target).square()
    return {name: (places, rows.cpu()) for name, (places, rows) in out.items()}


def _target(plan: PackPlan, inputs: StreamInputs, stage: Bagel) -> Tensor:
    """What the model should predict for each latent token of the micro-batch, [G, d]."""
    plan, every = plan.to(inputs.latents.device), slice(None)
    return flow_tokens(plan, every, inputs.latents, inputs.noise, stage.model_config, torch.float32).target


def _inside(rows: Tensor, start: int, length: int) -> Tensor:
    """Which of these rows of a stream lie in a chunk of it."""
    return ((rows >= start) & (rows < start + length)).nonzero()[:, 0]


def own_vit_tokens(share: Share, stage: Bagel) -> Tensor:
    """Which of the share's ViT tokens belong to pictures that this rank runs through the tower."""
    group = parallel_state.get_tensor_and_context_parallel_group()
    seqlens = share.plan.vit_seqlens
    owners = image_owners(seqlens.tolist(), stage.model_config.vit, group.size())
    return (torch.tensor(owners, dtype=torch.int64).repeat_interleave(seqlens) == group.rank()).nonzero()[:, 0]


def _whole_streams(rows: Tensor, stage: Bagel, und_length: int, gen_length: int) -> tuple[Tensor, Tensor]:
    """Both streams of [und shard | gen shard] rows, gathered over the tensor-parallel ranks where they are sharded."""
    if not stage.config.sequence_parallel:
        return rows.split([und_length, gen_length])
    tp = parallel_state.get_tensor_model_parallel_world_size()
    shards = [torch.empty_like(rows) for _ in range(tp)]
    dist.all_gather(shards, rows.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    pairs = [s.split([und_length // tp, gen_length // tp]) for s in shards]
    return torch.cat([u for u, _ in pairs]), torch.cat([g for _, g in pairs])


def _all_rows(rows: Tensor, stage: Bagel) -> Tensor:
    """Rows that the tensor-parallel ranks hold some of each, in rank order, where the streams are sharded."""
    if not stage.config.sequence_parallel:
        return rows
    parts = [None] * parallel_state.get_tensor_model_parallel_world_size()
    dist.all_gather_object(parts, rows.cpu(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts).to(rows.device)
