"""Attention of new rows to keys that are kept from earlier passes and to one another, on any device; for inference.

The keys of each context lie in one run, so there is nothing to gather: one call of the kernel for each context.
"""

from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention


def attend(q: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
    """q [n, heads, d], keys and values [m, kv heads, d], the last n of them those of the queries -> [n, heads, d].

    `causal`: query i sees the first m - n + i + 1 keys, else all.
    """
    rows, heads, d = q.shape
    kv_heads = keys.shape[1]
    q = q.unflatten(1, (kv_heads, heads // kv_heads)).permute(1, 2, 0, 3)  # [kv heads, heads of a group, n, d]
    # heads of a group repeat their keys in a view: the kernel reads them, nobody copies them
    keys, values = (x.transpose(0, 1)[:, None].expand(-1, q.shape[1], -1, -1) for x in (keys, values))
    mask = causal_lower_right(rows, keys.shape[2]) if causal and rows > 1 else None
    return scaled_dot_product_attention(q, keys, values, attn_mask=mask).permute(2, 0, 1, 3).reshape(rows, heads, d)
