"""Run by test_runtime.py on 4 ranks: what `sys.argv[1]` asks for, inside the failure guard."""

import os
import sys
import time
import warnings

import torch
import torch.distributed as dist

from megabagel.config.schema import ParallelConfig
from megabagel.runtime import failure
from megabagel.runtime.distributed import destroy, initialize


class BadInputError(ValueError):
    """Stands for errors whose sentence is enough."""


def fail_on_one_rank(kind: str) -> None:
    layout = initialize(ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), seed=1)
    dist.barrier()
    print(f"failing at {time.time()}", flush=True)
    if layout.rank == 3:
        if kind == "expected":
            raise BadInputError("the table has no rows")
        {}["missing key"]
    dist.all_reduce(torch.ones(1))
    print("nobody gets here")


def check_layout_and_adapter() -> None:
    """TP2 x DP2: groups, source ranks, seeds, a tensor-parallel linear, and functions free of torch.compile."""
    from megatron.core.extensions import transformer_engine  # noqa: F401  a late import that must not disturb
    from megatron.core.fusions.fused_bias_swiglu import swiglu
    from megatron.core.tensor_parallel import ColumnParallelLinear, get_cuda_rng_tracker
    from megatron.core.transformer.transformer_config import TransformerConfig

    layout = initialize(ParallelConfig(tensor_model_parallel_size=2), seed=5)
    assert (layout.tp_size, layout.pp_size, layout.dp_size) == (2, 1, 2)
    assert layout.replica_ranks == ((0, 1) if layout.rank < 2 else (2, 3))
    assert layout.is_source == (layout.rank in (0, 2)) and layout.is_last_stage_writer == (layout.rank == 0)
    plan = [f"plan of {layout.rank}" if layout.is_source else None]
    dist.broadcast_object_list(plan, layout.source_rank, group=layout.replica_group)
    assert plan == [f"plan of {layout.source_rank}"]
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, use_cpu_initialization=False)
    linear = ColumnParallelLinear(8, 8, config=config, init_method=torch.nn.init.normal_, bias=False)
    weights = [torch.empty_like(linear.weight) for _ in range(4)]
    dist.all_gather(weights, linear.weight.detach())
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])
    with get_cuda_rng_tracker().fork():
        assert torch.rand(1).isfinite()
    assert not hasattr(swiglu, "_torchdynamo_orig_callable")
    destroy()
    print("layout ok" if layout.rank == 0 else "", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with failure.guard(BadInputError):
        if sys.argv[1] == "layout":
            check_layout_and_adapter()
        elif sys.argv[1] == "everywhere":
            raise BadInputError(f"pid {os.getpid()} found the same fault as all others")
        else:
            fail_on_one_rank(sys.argv[1])
