"""Runs one step of the real training code on these ranks and collects what it computed inside.

Forward values come from hooks on the modules, gradients from the DDP buffers after they were summed.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megabagel.checkpoint.hf import stage_rules
from megabagel.checkpoint.names import export_shard
from megabagel.models.bagel import Bagel
from megabagel.models.embeddings import StreamInputs
from megabagel.models.flow import velocity
from parity.plans import Share

# name -> places of the rows in the saved order, rows
Captured = dict[str, tuple[Tensor, Tensor]]


@dataclass
class Recorder:
    """Forward hooks on one stage; `rows` holds each hooked module's outputs in the order of its calls."""

    rows: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    handles: list = field(default_factory=list)

    def attach(self, stage: Bagel) -> "Recorder":
        if stage.pre_process:
            self._watch("llm_input", stage.embeddings)
            if hasattr(stage.embeddings.und, "vit"):
                self._watch("vit_last_hidden", stage.embeddings.und.vit)
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
            if hasattr(stage.heads, "llm2vae"):
                self._watch("velocity", stage.heads.llm2vae)
        return self

    def _watch(self, name: str, module: nn.Module, inputs: bool = False) -> None:
        def hook(_, args, output):
            value = args[0] if inputs else output
            if isinstance(value, tuple) and name != "losses":
                value = value[0]
            self.rows[name].append(value if name == "losses" else value.detach().clone())

        self.handles.append(module.register_forward_hook(hook))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()


def forward_values(recorder: Recorder, share: Share, inputs: StreamInputs, stage: Bagel) -> Captured:
    """The recorded rows of one forward pass without padding, with their places in the saved order."""
    plan, out = share.plan, {}
    und, gen = len(plan.und_index), len(plan.gen_index)
    places = torch.cat([share.positions[plan.und_index], share.positions[plan.gen_index]])

    def streams(und_rows: Tensor, gen_rows: Tensor) -> tuple[Tensor, Tensor]:
        return places, torch.cat([und_rows[:und], gen_rows[:gen]])

    for name, calls in recorder.rows.items():
        value = calls[0]
        if name == "llm_input" or name.startswith("layer_out."):
            out[name] = streams(*_whole_streams(value[:, 0], stage, plan.und_length, plan.gen_length))
        elif name == "final":
            out["last_hidden_state"] = streams(*calls)
        elif name in ("vit_last_hidden", "vit_connector_out"):
            out[name] = share.vit, value[: len(share.vit)]
        elif name in ("timesteps", "timestep_embeds"):
            out[name] = share.latent, value[:gen]
        elif name == "losses":
            out["ce"] = share.ce, value.ce.detach()[:-1]
            out["mse_mean"] = share.mse, value.mse.detach()[: len(share.mse)]
        elif name == "velocity":
            target = velocity(inputs.latents, inputs.noise)[plan.mse_rows]
            out["mse"] = share.mse, (value[:-1] - target).square()
    return out


def _whole_streams(rows: Tensor, stage: Bagel, und_length: int, gen_length: int) -> tuple[Tensor, Tensor]:
    """Both streams of [und shard | gen shard] rows, gathered over the tensor-parallel ranks where they are sharded."""
    if not stage.config.sequence_parallel:
        return rows.split([und_length, gen_length])
    tp = parallel_state.get_tensor_model_parallel_world_size()
    shards = [torch.empty_like(rows) for _ in range(tp)]
    dist.all_gather(shards, rows.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    pairs = [s.split([und_length // tp, gen_length // tp]) for s in shards]
    return torch.cat([u for u, _ in pairs]), torch.cat([g for _, g in pairs])


Shards = dict[str, tuple[Tensor, int | None]]


def export(stage: Bagel, values: dict[str, Tensor]) -> Shards:
    """Values by parameter name -> this rank's shards by released name."""
    rules = stage_rules(stage)
    shards: Shards = {}
    for parameter, value in values.items():
        for name, (shard, dim) in export_shard(value, rules[parameter]).items():
            shards[name] = shard.detach().float().clone(), dim
    return shards


def gather(value: object) -> list | None:
    """Every rank's object on rank 0, in rank order; None elsewhere."""
    if dist.get_world_size() == 1:
        return [value]
    out = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, out)
    return out


def gather_tensors(shards: Shards) -> dict[str, list[Tensor]] | None:
    """Whole tensors by released name on rank 0: every copy that the ranks hold, sharded ones put together."""
    position = (parallel_state.get_data_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank())
    everything = gather((position, parallel_state.get_tensor_model_parallel_rank(), shards))
    if everything is None:
        return None
    whole: dict[str, list[Tensor]] = defaultdict(list)
    by_position = defaultdict(dict)
    for position, tp_rank, held in everything:
        by_position[position][tp_rank] = held
    for ranks in by_position.values():
        for name, (_, dim) in ranks[0].items():
            parts = [ranks[r][name][0] for r in sorted(ranks)]
            whole[name].extend(parts if dim is None else [torch.cat(parts, dim=dim)])
    return dict(whole)


def gather_rows(captured: Captured) -> dict[str, dict[int, list[tuple[Tensor, Tensor]]]] | None:
    """Forward values on rank 0: name -> tensor-parallel rank -> (places, rows) of every replica's copy."""
    everything = gather((parallel_state.get_tensor_model_parallel_rank(), captured))
    if everything is None:
        return None
    rows: dict = defaultdict(lambda: defaultdict(list))
    for tp_rank, held in everything:
        for name, (places, part) in held.items():
            rows[name][tp_rank].append((places, part))
    return rows
