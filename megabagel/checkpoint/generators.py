"""The state of this process's random generators, for a checkpoint. Seeds and streams are `runtime`'s business."""

import random

import numpy as np
import torch
from megatron.core import tensor_parallel


def state() -> dict:
    """Of Python's, NumPy's, torch's and megatron-core's generators; later draws do not change it."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def restore(saved: dict) -> None:
    """Let all generators go on from what `state` returned."""
    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(saved["megatron"])
