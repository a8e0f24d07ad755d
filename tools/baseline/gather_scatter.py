"""The MoT decoder layer as it is usually written, to compare with: one sequence, and around every linear and norm an
index gather of the und and gen tokens and a scatter back.

Weights come from a megabagel layer, so that both compute the same function. Attention is the caller's.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from megabagel.models.mot_layer import MoTLayer
from megabagel.models.stream import Stream
from megabagel.packing.plan import PackPlan

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [L, heads, d], k and v [L, kv heads, d] -> [L, heads, d]
_TWINS = ("und", "gen")


class _Weights(nn.Module):
    """One stream's weights, projections apart as in the released checkpoints."""

    def __init__(self, stream: Stream):
        super().__init__()
        config = stream.config
        groups, d = config.num_query_groups, config.kv_channels
        per_group = config.num_attention_heads // groups + 2

        def part(tensor: Tensor, rows: slice) -> nn.Parameter:
            grouped = tensor.detach().view(groups, per_group, d, *tensor.shape[1:])[:, rows]
            return nn.Parameter(grouped.reshape(-1, *tensor.shape[1:]).clone())

        for name, rows in (("q", slice(-2)), ("k", slice(-2, -1)), ("v", slice(-1, None))):
            setattr(self, f"{name}_weight", part(stream.linear_qkv.weight, rows))
            setattr(self, f"{name}_bias", part(stream.linear_qkv.bias, rows))
        for name, module in (
            ("input_norm", stream.input_layernorm),
            ("q_norm", stream.q_layernorm),
            ("k_norm", stream.k_layernorm),
            ("o_weight", stream.linear_proj),
            ("mlp_norm", stream.pre_mlp_layernorm),
            ("up_weight", stream.mlp.linear_fc1),
            ("down_weight", stream.mlp.linear_fc2),
        ):
            setattr(self, name, nn.Parameter(module.weight.detach().clone()))


class GatherScatterLayer(nn.Module):
    """Computes what `layer` computes, on [L, hidden] in sequence order."""

    def __init__(self, layer: MoTLayer):
        super().__init__()
        config = layer.config
        self.heads, self.kv_heads, self.d = config.num_attention_heads, config.num_query_groups, config.kv_channels
        self.eps = config.layernorm_epsilon
        self.und, self.gen = _Weights(layer.und), _Weights(layer.gen)

    def _routed(self, x: Tensor, indexes: tuple[Tensor, Tensor], function: Callable) -> Tensor:
        """`function(rows, weights)` on the tokens of each modality, scattered into one tensor."""
        out = None
        for name, index in zip(_TWINS, indexes, strict=True):
            result = function(x[index], getattr(self, name))
            if out is None:
                out = x.new_zeros(len(x), *result.shape[1:])
            out[index] = result
        return out

    def forward(
        self, x: Tensor, indexes: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, attention: Attention
    ) -> Tensor:
        """x [L, hidden]; indexes: positions of und and gen tokens; cos, sin [L, d] -> [L, hidden]."""
        residual = x
        x = self._routed(x, indexes, lambda rows, w: rms_norm(rows, w.input_norm.shape, w.input_norm, self.eps))
        q = self._routed(x, indexes, lambda rows, w: linear(rows, w.q_weight, w.q_bias))
        k = self._routed(x, indexes, lambda rows, w: linear(rows, w.k_weight, w.k_bias))
        v = self._routed(x, indexes, lambda rows, w: linear(rows, w.v_weight, w.v_bias))
        q, k, v = q.view(-1, self.heads, self.d), k.view(-1, self.kv_heads, self.d), v.view(-1, self.kv_heads, self.d)
        q = self._routed(q, indexes, lambda rows, w: rms_norm(rows, (self.d,), w.q_norm, self.eps))
        k = self._routed(k, indexes, lambda rows, w: rms_norm(rows, (self.d,), w.k_norm, self.eps))
        context = attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v).reshape(len(x), -1)
        x = residual + self._routed(context, indexes, lambda rows, w: linear(rows, w.o_weight))
        residual = x
        x = self._routed(x, indexes, lambda rows, w: rms_norm(rows, w.mlp_norm.shape, w.mlp_norm, self.eps))
        return residual + self._routed(x, indexes, _mlp)


def _mlp(rows: Tensor, weights: _Weights) -> Tensor:
    gate, up = linear(rows, weights.up_weight).chunk(2, dim=-1)
    return linear(silu(gate) * up, weights.down_weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]).to(x.dtype)


def dense_masks(plan: PackPlan) -> list[Tensor]:
    """Of each sample, bool [len, len]: row = query, column = key, true = may attend."""
    ends = plan.sample_lens.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    masks = [torch.zeros(end - start, end - start, dtype=torch.bool) for start, end in zip(starts, ends, strict=True)]
    for start, length, prefix, prefix_length, causal in plan.problems.tolist():
        queries = plan.attention_index[start : start + length]
        sample = next(number for number, end in enumerate(ends) if queries[0] < end)
        keys = torch.cat([plan.attention_index[prefix : prefix + prefix_length], queries]) - starts[sample]
        allowed = torch.ones(length, prefix_length + length, dtype=torch.bool)
        allowed = allowed.tril(prefix_length) if causal else allowed
        masks[sample][(queries - starts[sample])[:, None], keys[None]] = allowed
    return masks


def dense_attention(masks: list[Tensor]) -> Attention:
    """Each sample by itself under its dense mask, as trainers do on hardware without block-sparse kernels."""
    lengths = [len(mask) for mask in masks]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        parts = [
            scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in sample), attn_mask=mask)[0].transpose(0, 1)
            for *sample, mask in zip(q.split(lengths), k.split(lengths), v.split(lengths), masks, strict=True)
        ]
        return torch.cat(parts)

    return attend


def doubled(table: Tensor) -> Tensor:
    """cos or sin [L, d / 2] -> [L, d], as `_rotate` reads them."""
    return table.repeat(1, 2)
