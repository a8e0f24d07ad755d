"""megatron-core's data parallelism around the model's chunks, so that gradients are summed, never averaged.

Losses are divided by global counts before backward; nothing after that may scale a gradient.
"""

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.module import MegatronModule

from megabagel.config.schema import ParallelConfig
from megabagel.training.partial_sums import sum_partial_gradients


def wrap(model_chunks: list[MegatronModule], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    """Wrap each chunk for the distributed optimizer and connect the pipeline schedule's hooks in the chunks' config.

    Gradients are kept and reduced in float32. Parameters that shall not train must have requires_grad False by now. The
    chunks share one TransformerConfig with `calculate_per_token_loss`, which makes megatron-core sum over data-parallel
    ranks; the loss function given to its schedules then returns (loss, number of tokens, dict) and no further scaling
    happens: the number of tokens is ignored here.
    """
    config = model_chunks[0].config
    if not config.calculate_per_token_loss:
        raise ValueError("the model's TransformerConfig must have calculate_per_token_loss=True: gradients are summed")
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_param_gather=config.fp8_param,
    )
    chunks = [
        # only the first chunk's communication is worth cutting into buckets: the others hide behind computation
        DistributedDataParallel(config, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(model_chunks)
    ]
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    config.finalize_model_grads_func = _finalize
    return chunks


def wrap_empty(model_chunks: list[MegatronModule], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    """`wrap` for chunks whose weights are still to be filled: trainable parameters are never in memory twice.

    megatron-core copies each parameter into a buffer of all; here there is nothing to copy but one repeated number.
    Parameters kept in FP8 are left to it.
    """
    for chunk in model_chunks:
        for parameter in chunk.parameters():
            if parameter.requires_grad and type(parameter.data) is torch.Tensor:
                parameter.data = parameter.new_zeros(()).expand(parameter.shape)
    return wrap(model_chunks, parallel)


def _finalize(model: list[DistributedDataParallel], num_tokens: torch.Tensor | None = None, **options: object) -> None:
    """Sum gradients over data-parallel and, where a weight is replicated, tensor-parallel ranks; no scaling."""
    finalize_model_grads(model, None, **options)
    sum_partial_gradients(model, parallel_state.get_tensor_model_parallel_group())
