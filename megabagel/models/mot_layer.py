"""The Mixture-of-Transformers decoder layer: two streams, one joint attention (Liang et al. 2024; BAGEL).

Runs unchanged inside megatron-core's TransformerBlock, given by ModuleSpec.
"""

from dataclasses import dataclass, field

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from torch import Tensor

from megabagel.models.routing import Routing
from megabagel.models.split_attention import split_attention
from megabagel.models.stream import Stream, StreamSubmodules


@dataclass
class MoTLayerSubmodules:
    """What a layer is made of; `shared` names the parts (see `stream.PARTS`) that gen borrows from und."""

    stream: StreamSubmodules = field(default_factory=StreamSubmodules)
    shared: frozenset[str] = frozenset()


class MoTLayer(MegatronModule, BaseTransformerLayer):
    """Pre-norm decoder layer on `[und rows | gen rows]`.

    `freeze_und` cuts the graph wherever the und stream would carry a gradient: at its residual and at what attention
    gives back to it. Its weights are frozen by `build.py`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoTLayerSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        freeze_und: bool = False,
    ):
        super().__init__(config)
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage)
        self.freeze_und = freeze_und
        self.und = Stream(config, submodules.stream, pg_collection.tp)
        self.gen = Stream(config, submodules.stream, pg_collection.tp, owner=self.und, shared=submodules.shared)

    def forward(self, hidden_states: Tensor, packed_seq_params: Routing, **_) -> tuple[Tensor, None]:
        """[und rows + gen rows of this rank, 1, hidden] -> the same shape; the second value is the unused context."""
        routing = packed_seq_params
        lengths = routing.stream_lengths
        scale = sum(lengths) // hidden_states.shape[0]  # ranks that share the rows under sequence parallelism
        und, gen = hidden_states.split([length // scale for length in lengths])
        if self.freeze_und:
            und = und.detach()
        cos, sin = (t.split(lengths) for t in routing.rotary)
        und_qkv = self.und.qkv(und, (cos[0], sin[0]))
        gen_qkv = self.gen.qkv(gen, (cos[1], sin[1]))
        q, k, v = (torch.cat(pair) for pair in zip(und_qkv, gen_qkv, strict=True))
        und_context, gen_context = split_attention(q, k, v, routing.attention).split(lengths)
        if self.freeze_und:
            und_context = und_context.detach()
        und = und + self.und.project(und_context)
        gen = gen + self.gen.project(gen_context)
        und = und + self.und.feed_forward(und)
        gen = gen + self.gen.feed_forward(gen)
        return torch.cat([und, gen]), None
