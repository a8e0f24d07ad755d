"""Selective recomputation: parts of a layer whose activations are computed again in the backward pass.

Full recomputation of whole layers is megatron-core's TransformerBlock's own matter.
"""

from collections.abc import Callable

from megatron.core import parallel_state, tensor_parallel
from megatron.core.extensions.transformer_engine import te_checkpoint
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class Recompute:
    """What `config.recompute_modules` names, when `recompute_granularity` is selective."""

    def __init__(self, config: TransformerConfig):
        selective = config.recompute_granularity == "selective"
        self.modules = frozenset(config.recompute_modules) if selective else frozenset()
        self.fp8 = config.fp8

    def run(self, part: str, function: Callable, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """`function(*tensors)`; what it keeps for its backward pass is computed again there if `part` is named."""
        if part not in self.modules:
            return function(*tensors)
        if self.fp8 and part != "core_attn":  # which multiplies nothing in FP8
            # runs it again in the FP8 context and with the scales of its first run
            tracker, group = tensor_parallel.get_cuda_rng_tracker, parallel_state.get_tensor_model_parallel_group()
            return te_checkpoint(function, False, tracker, group, *tensors)
        return tensor_parallel.checkpoint(function, False, *tensors)

    def through_norm(self, norm: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function(norm(x))`; the normalised rows, which `function` must save as they are, are not kept if named."""
        if "layernorm" not in self.modules:
            return function(norm(x))
        checkpoint = tensor_parallel.CheckpointWithoutOutput(fp8=self.fp8)
        out = function(checkpoint.checkpoint(norm, x))
        checkpoint.discard_output_and_register_recompute(out)
        return out
