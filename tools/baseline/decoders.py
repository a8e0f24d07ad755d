"""megabagel's decoder and the one written with gather and scatter, with the same weights, on any device.

Both take and give [L, hidden] in sequence order, so that they compare; heads and embeddings are left out.
"""

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from baseline.gather_scatter import Attention, GatherScatterLayer, doubled
from megabagel.config.schema import Config
from megabagel.models.build import DTYPES, transformer_config
from megabagel.models.rotary import rotary_table
from megabagel.models.routing import route
from megabagel.models.specs import block_spec
from megabagel.ops.stream import stream_merge, stream_split
from megabagel.packing.chunk import chunk_of
from megabagel.packing.plan import PackPlan


class TwoStreams(nn.Module):
    """megabagel's layers with random weights; the routing of the pack is made anew in every step, as in training."""

    def __init__(self, config: Config, plan: PackPlan, device: torch.device):
        super().__init__()
        groups = ProcessGroupCollection.use_mpu_process_groups()
        settings = transformer_config(config)
        spec = block_spec(settings, config.model, config.parallel, 0, config.model.num_layers)
        with torch.device(device):
            self.block = TransformerBlock(settings, spec, post_layer_norm=False, pg_collection=groups)
        draw = torch.Generator(device).manual_seed(0)
        for name, parameter in self.named_parameters():
            norm = name.endswith("norm.weight")
            values = torch.randn(parameter.shape, generator=draw, device=device) * (0.1 if norm else 0.03) + norm
            parameter.data = values.to(DTYPES[config.training.params_dtype])
        self.config, self.plan = config, plan
        positions = torch.cat([plan.und_index, plan.gen_index])
        rows = torch.cat([torch.arange(plan.und_index.numel()), plan.und_length + torch.arange(plan.gen_index.numel())])
        order = torch.empty_like(positions).scatter_(0, positions, rows)  # of each position, its row
        inverse = torch.full((plan.und_length + plan.gen_length,), -1).scatter_(0, rows, positions)
        self.order, self.inverse = order.to(device), inverse.to(device)

    def forward(self, x: Tensor) -> Tensor:
        model = self.config.model
        head_dim = model.hidden_size // model.num_attention_heads
        backend = self.config.kernels.attention_backend
        chunk = chunk_of(self.plan, 0, 1)
        routing = route(self.plan, chunk, 0, 1, head_dim, model.rotary_base, backend, x.device, x.dtype)
        rows = stream_split(x, self.inverse, self.order)[:, None]
        out = self.block(hidden_states=rows, attention_mask=None, packed_seq_params=routing)
        return stream_merge(out[:, 0], self.order, self.inverse)


class GatherScatter(nn.Module):
    """The baseline with the weights of `streams`; `attention` is made anew in every step, as masks are in training."""

    def __init__(self, streams: TwoStreams, attention: Callable[[], Attention]):
        super().__init__()
        self.layers = nn.ModuleList([GatherScatterLayer(layer) for layer in streams.block.layers])
        self.model, self.attention = streams.config.model, attention
        plan, device = streams.plan, streams.order.device
        self.indexes = plan.und_index.to(device), plan.gen_index.to(device)
        self.position_ids = plan.position_ids.to(device)

    def forward(self, x: Tensor) -> Tensor:
        head_dim = self.model.hidden_size // self.model.num_attention_heads
        tables = rotary_table(self.position_ids, head_dim, self.model.rotary_base)
        cos, sin = (doubled(table) for table in tables)
        attention = self.attention()
        for layer in self.layers:
            x = layer(x, self.indexes, cos, sin, attention)
        return x


def step(model: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """Forward and backward; gradients of the weights are new tensors each time. -> output."""
    model.zero_grad(set_to_none=True)
    x.grad = None
    out = model(x)
    out.backward(grad)
    return out
