"""megatron-core's mark of expert parameters: whole on their rank, gradients summed over expert data-parallel ranks.

Set on every parameter of an MLP that only some expert-parallel ranks hold, even if one rank holds all. Builds nothing.
"""

from torch import Tensor, nn


def mark_as_expert(module: nn.Module) -> None:
    """Mark all parameters of `module`; the gradient buffers, the optimizer and checkpoints read the mark."""
    for parameter in module.parameters():
        parameter.allreduce = False


def is_expert(parameter: Tensor) -> bool:
    """Whether the parameter is marked (megatron-core leaves most other parameters without the attribute)."""
    return not getattr(parameter, "allreduce", True)
