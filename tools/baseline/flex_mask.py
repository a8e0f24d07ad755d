"""Attention of the baseline on a GPU: FlexAttention with a mask function over the packed sequence, as BAGEL trains.

A token sees what comes before it in its sample and all of its own image, but no noised image that is not its own. The
block mask is made of the mask function by torch itself, which looks at every pair of blocks.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import pad

from baseline.gather_scatter import Attention
from megabagel.packing.plan import CAUSAL, NOISE, PackPlan

BLOCK = 128


@lru_cache(maxsize=1)
def _compiled() -> Callable:
    return torch.compile(flex_attention)


def _mask_function(plan: PackPlan, length: int, device: torch.device) -> Callable[..., Tensor]:
    """Of a query and a key position below `length`, whether the query sees the key."""

    def per_token(values: Tensor, lengths: Tensor, padding: int) -> Tensor:
        tokens = values.repeat_interleave(lengths)
        return pad(tokens, (0, length - len(tokens)), value=padding).to(device)

    splits = torch.arange(len(plan.split_lens))
    sample = per_token(torch.arange(len(plan.sample_lens)), plan.sample_lens, -1)
    image = per_token(splits.where(plan.split_modes != CAUSAL, -1), plan.split_lens, -1)
    noise = per_token((plan.split_modes == NOISE).long(), plan.split_lens, 0).bool()

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own_image = (image[query] == image[key]) & (image[query] >= 0)
        return (sample[query] == sample[key]) & (own_image | ((query >= key) & ~noise[key]))

    return visible


def flex_masked_attention(plan: PackPlan, device: torch.device) -> Attention:
    """Compiled on a GPU, plain on the CPU."""
    length = -(-plan.sequence_length // BLOCK) * BLOCK
    on_gpu = device.type == "cuda"
    visible = _mask_function(plan, length, device)
    mask = create_block_mask(visible, None, None, length, length, device=device, BLOCK_SIZE=BLOCK, _compile=on_gpu)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        padding = (0, 0, 0, 0, 0, length - len(q))
        q, k, v = (pad(t, padding).transpose(0, 1)[None] for t in (q, k, v))
        function = _compiled() if on_gpu else flex_attention
        out = function(q, k, v, block_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)[: plan.sequence_length]

    return attend
