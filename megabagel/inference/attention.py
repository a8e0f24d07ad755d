"""The routing of a pass whose rows also see what their contexts have cached; layers use it as they use any other."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megabagel.inference.cache import KeyValueCache
from megabagel.models.attention import AttentionPlan
from megabagel.models.attention.cached import attend
from megabagel.models.routing import Routing


@dataclass(frozen=True)
class CachedRows:
    """New rows of one context, in attention order."""

    cache: KeyValueCache
    rows: slice
    causal: bool


@dataclass
class CachedRouting(Routing):
    """Attention is told its layer: every layer has keys of its own."""

    cached: Sequence[CachedRows] = ()

    def attention_in(self, layer: int) -> AttentionPlan:
        return partial(self._attend, layer - 1)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for new in self.cached:
            keys, values = new.cache.write(layer, k[new.rows], v[new.rows])
            parts.append(attend(q[new.rows], keys, values, new.causal))
        return torch.cat(parts) if len(parts) > 1 else parts[0]
