"""Attention as at most two calls of a variable-length kernel: all causal problems, all full ones.

Here is the index logic alone; which kernel there is, is in `varlen_kernels.py`.
"""

import numpy as np
import torch
from torch import Tensor

from megabagel.models.attention.block_table import runs
from megabagel.models.attention.gather import RowGather
from megabagel.models.attention.varlen_kernels import VarlenCall, VarlenKernel


class VarlenPlan:
    """Problems [P, 5] (see `packing.plan.Problem`), causal ones first, and where their rows come from.

    A gather is None where it would change nothing. What several problems see is copied for each of them.
    """

    def __init__(self, problems: np.ndarray, kernel: VarlenKernel, device: torch.device):
        problems = problems[np.lexsort((problems[:, 0], 1 - problems[:, 4]))]
        start, length, prefix_start, prefix_length, causal = problems.T
        self.kernel = kernel
        self.calls, self.query_rows, self.key_rows = [], [], []
        for kind in (True, False):
            of_kind = causal == kind
            if of_kind.any():
                self.calls.append(_call(length[of_kind], (prefix_length + length)[of_kind], kind, device))
                self.query_rows.append(int(length[of_kind].sum()))
                self.key_rows.append(int((prefix_length + length)[of_kind].sum()))
        queries = runs(start, length)
        # prefix and own rows of each problem, one after the other
        keys = runs(np.stack([prefix_start, start], 1).ravel(), np.stack([prefix_length, length], 1).ravel())
        back = np.empty_like(queries)
        back[queries] = np.arange(queries.size)
        self.gather_queries, self.gather_keys, self.give_back = (
            None if np.array_equal(rows, np.arange(queries.size)) else RowGather(rows, device)
            for rows in (queries, keys, back)
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [L, heads, d], k and v [L, kv heads, d] -> [L, heads, d]."""
        if not self.calls:
            return q + 0
        if self.gather_queries is not None:
            q = self.gather_queries(q)
        if self.gather_keys is not None:
            k, v = self.gather_keys(k), self.gather_keys(v)
        parts = zip(q.split(self.query_rows), k.split(self.key_rows), v.split(self.key_rows), self.calls, strict=True)
        results = [self.kernel(*qkv, call) for *qkv, call in parts]
        out = torch.cat(results) if len(results) > 1 else results[0]
        return out if self.give_back is None else self.give_back(out)


def _call(query_lengths: np.ndarray, key_lengths: np.ndarray, causal: bool, device: torch.device) -> VarlenCall:
    cumulative = (np.append(0, np.cumsum(lengths)).astype(np.int32) for lengths in (query_lengths, key_lengths))
    on_device = (torch.from_numpy(lengths).to(device) for lengths in cumulative)
    return VarlenCall(*on_device, int(query_lengths.max()), int(key_lengths.max()), causal)
