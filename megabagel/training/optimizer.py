"""Builds megatron-core's distributed optimizer from our configuration and steps it, unless gradients are not finite.

The learning rate's course is in schedule.py.
"""

import math

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import optimizer as megatron_optimizer

from megabagel.config.schema import OptimizerConfig, ParallelConfig, TrainingConfig
from megabagel.training import adam


def build_optimizer(
    optimizer: OptimizerConfig,
    training: TrainingConfig,
    parallel: ParallelConfig,
    model_chunks: list[DistributedDataParallel],
) -> MegatronOptimizer:
    """AdamW over the trainable parameters of chunks from `wrap`, its state sharded over the data-parallel ranks.

    `update` steps it. Main parameters and both moments are float32. Weight decay applies to every trainable parameter,
    as in official BAGEL.
    Raises ValueError when a trainable parameter is not of `training.params_dtype`: megatron-core would mix up the
    state of parameters of two types.
    """
    adam.use_where_no_fused_adam_is_installed()
    bf16 = training.params_dtype == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    for chunk in model_chunks:
        for name, parameter in chunk.module.named_parameters():
            if parameter.requires_grad and parameter.dtype != dtype:
                raise ValueError(f"parameter {name} is {parameter.dtype}; all that train must be {dtype}")
    model = model_chunks[0].config
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=bf16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_recipe=model.fp8_recipe if model.fp8_param else None,
    )
    built = get_megatron_optimizer(config, model_chunks, config_overrides={})
    for part in built.chained_optimizers[:-1]:
        # experts have an optimizer of their own, and each would gather all parameters after its step
        part.model_chunks = []
    return built


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Use `lr` in the next update, on all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def update(optimizer: MegatronOptimizer, losses_are_finite: bool = True) -> float:
    """Step by the gradients in the stages' buffers; the norm of the gradient before clipping, equal on all ranks.

    It counts replicated parameters once; clipping multiplies by clip_grad / (norm + 1e-6) when that is below 1, and 0
    switches it off. When the norm is not finite nothing has changed. A rank may know that its losses are not finite,
    which no gradient need show: then the norm is not finite anywhere.
    """
    optimizer.prepare_grads()
    parts = [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
    if not losses_are_finite:  # said by the one number that all ranks exchange anyway
        for gradient in (p.grad for part in parts for p in part.get_parameters() if p.grad is not None):
            gradient.fill_(math.nan)
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm
    for part in parts:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            megatron_optimizer.clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)
    optimizer.step_with_ready_grads()
    return norm
