"""Whole parameters while data parallelism overlaps their gathering with the forward pass; nothing else on overlap."""

import contextlib
from collections.abc import Iterator, Sequence

from megatron.core.distributed import DistributedDataParallel


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
