"""Selective recomputation: parts of a layer whose activations are computed again in the backward pass.

Full recomputation of whole layers is megatron-core's TransformerBlock's own matter.
"""

from collections.abc import Callable

from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class Recompute:
    """What `config.recompute_modules` names, when `recompute_granularity` is selective."""

    def __init__(self, config: TransformerConfig):
        selective = config.recompute_granularity == "selective"
        self.modules = frozenset(config.recompute_modules) if selective else frozenset()

    def run(self, part: str, function: Callable, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """`function(*tensors)`; what it keeps for its backward pass is computed again there if `part` is named."""
        return tensor_parallel.checkpoint(function, False, *tensors) if part in self.modules else function(*tensors)

    def through_norm(self, norm: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function(norm(x))`; the normalised rows, which `function` must save as they are, are not kept if named."""
        if "layernorm" not in self.modules:
            return function(norm(x))
        checkpoint = tensor_parallel.CheckpointWithoutOutput()
        out = function(checkpoint.checkpoint(norm, x))
        checkpoint.discard_output_and_register_recompute(out)
        return out
