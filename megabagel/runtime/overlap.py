"""Keeps model parameters whole and equal to the distributed optimizer's main parameters outside of training steps.

Inside of steps megatron-core does that by itself. Not for gradients.
"""

import contextlib
from collections.abc import Iterator, Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer


@contextlib.contextmanager
def whole_parameters(model_chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Inside, every parameter is up to date and may be read or replaced without calling its module.

    With overlap_param_gather, parameters are gathered only when a module is called; anything that reads them directly
    (checkpoints, export, evaluation) sees old values outside of this.
    """
    overlapped = [chunk for chunk in model_chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()


def publish_main_parameters(optimizer: MegatronOptimizer) -> None:
    """Write the optimizer's main parameters into the model's, whole on every rank, as the end of a step does.

    To be called inside `whole_parameters`.
    """
    for part in optimizer.chained_optimizers:
        part._copy_main_params_to_model_params()
    for chunk in optimizer.model_chunks:
        chunk.start_param_sync(force_sync=True)
