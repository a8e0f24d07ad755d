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
    q = q.view(rows, kv_heads, heads // kv_heads, d)
    keys, values = (x.transpose(0, 1)[:, None] for x in (keys, values))  # [kv heads, 1, m, d]
    if not causal or rows == 1:
        # where all queries see all keys, the heads of a group are queries of one head
        q = q.transpose(0, 1).reshape(kv_heads, 1, -1, d)
        out = scaled_dot_product_attention(q, keys, values)
        return out.reshape(kv_heads, rows, -1, d).transpose(0, 1).reshape(rows, heads, d)
    # heads of a group repeat their keys in a view: the kernel reads them, nobody copies them
    keys, values = (x.expand(-1, q.shape[2], -1, -1) for x in (keys, values))
    mask = causal_lower_right(rows, keys.shape[2])
    out = scaled_dot_product_attention(q.permute(1, 2, 0, 3), keys, values, attn_mask=mask)
    return out.permute(2, 0, 1, 3).reshape(rows, heads, d)
