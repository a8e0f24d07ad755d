"""The Mixture-of-Transformers decoder layer: two streams, one joint attention (Liang et al. 2024; BAGEL).

Runs unchanged inside megatron-core's TransformerBlock, given by ModuleSpec.
"""

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from torch import Tensor

from megabagel.models.context_parallel import heads_to_rows, rows_to_heads
from megabagel.models.modality_experts import ModalityExchange
from megabagel.models.recompute import Recompute
from megabagel.models.routing import Routing
from megabagel.models.stream import Stream, StreamSubmodules
from megabagel.ops.kv_gather import HeadNorms, kv_gather


@dataclass
class MoTLayerSubmodules:
    """What a layer is made of; `shared` names the parts (see `stream.PARTS`) that gen borrows from und."""

    und: StreamSubmodules
    gen: StreamSubmodules
    shared: frozenset[str] = frozenset()


class MoTLayer(MegatronModule, BaseTransformerLayer):
    """Pre-norm decoder layer on `[und rows | gen rows]` of this rank.

    `freeze_und` cuts the graph wherever the und stream would carry a gradient: at its residual and at what attention
    gives back to it. Its weights are frozen by `build.py`. `und_expert_ranks`: expert-parallel ranks that hold und's
    MLPs, None where every rank holds those of both streams.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoTLayerSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        freeze_und: bool = False,
        und_expert_ranks: int | None = None,
    ):
        super().__init__(config)
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage)
        self.freeze_und = freeze_und
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.recompute = Recompute(config)
        self.und = Stream(config, submodules.und, pg_collection)
        self.gen = Stream(config, submodules.gen, pg_collection, owner=self.und, shared=submodules.shared)
        self.exchange = None
        if und_expert_ranks is not None:
            self.exchange = ModalityExchange(config, und_expert_ranks, pg_collection)

    def forward(self, hidden_states: Tensor, packed_seq_params: Routing, **_) -> tuple[Tensor, None]:
        """[und rows + gen rows of this rank, 1, hidden] -> the same shape; the second value is the unused context."""
        routing = packed_seq_params
        lengths = routing.stream_lengths
        scale = sum(lengths) // hidden_states.shape[0]  # ranks that share the rows under sequence parallelism
        und, gen = hidden_states.split([length // scale for length in lengths])
        if self.freeze_und:
            und = und.detach()
        und_context, gen_context = self._attention(und, gen, routing)
        if self.freeze_und:
            und_context = und_context.detach()
        und = und + self.und.project(und_context)
        gen = gen + self.gen.project(gen_context)
        und_out, gen_out = self.recompute.run("mlp", lambda u, g: self._feed_forward(u, g, routing), und, gen)
        return torch.cat([und + und_out, gen + gen_out]), None

    def _attention(self, und: Tensor, gen: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Joint attention of both streams: [rows, 1, hidden] each -> [rows of the chunk, heads, d] each."""
        place, config = routing.placement, self.config
        qkv = kv_gather(
            self.und.qkv(und),
            self.gen.qkv(gen),
            HeadNorms(*self.und.head_norms(), *self.gen.head_norms()),
            place.cos,
            place.sin,
            place.order,
            place.inverse,
            config.num_attention_heads // config.num_query_groups,
            config.kv_channels,
            config.layernorm_epsilon,
        )
        qkv = rows_to_heads(qkv, self.cp_group, routing.order, routing.inverse)
        context = self.recompute.run("core_attn", routing.attention_in(self.layer_number), *qkv)
        rows = heads_to_rows(context, self.cp_group, routing.order, routing.inverse)
        return rows.split(routing.stream_lengths)

    def _feed_forward(self, und: Tensor, gen: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Norm and MLP of both streams, residual not added."""
        if self.exchange is not None:
            held = self.und.mlp if self.exchange.holds_und else self.gen.mlp
            return self.exchange(self.und.pre_mlp_layernorm(und), self.gen.pre_mlp_layernorm(gen), held)
        paddings = (routing.chunk.und_padding, routing.chunk.gen_padding)
        if self.config.sequence_parallel:
            paddings = [padding.chunk(self.tp_group.size())[self.tp_group.rank()] for padding in paddings]
        return tuple(
            self.recompute.through_norm(stream.pre_mlp_layernorm, lambda x, s=stream, p=p: s.mlp(x, padding=p)[0], rows)
            for stream, rows, p in zip((self.und, self.gen), (und, gen), paddings, strict=True)
        )
