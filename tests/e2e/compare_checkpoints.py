"""Program: exits non-zero unless two checkpoints hold bit-equal tensors (parameters, optimizer, EMA)."""

import sys

import torch

from megabagel.config.schema import ParallelConfig
from megabagel.runtime import distributed

if __name__ == "__main__":
    from megatron.core.dist_checkpointing import load_plain_tensors

    distributed.initialize(ParallelConfig(), 0)
    loaded = [load_plain_tensors(folder) for folder in sys.argv[1:3]]
    first, second = ({k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)} for tensors in loaded)
    assert first.keys() == second.keys() and len(first) > 100, (len(first), len(second))
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different
    distributed.destroy()
