"""Data-parallel groups of modality experts: ranks that hold the same MLPs reduce their gradients together.

megatron-core's own groups assume that every expert-parallel rank holds other experts.
"""

import torch.distributed as dist
from megatron.core import parallel_state

_SAME_EXPERTS = ("_EXPERT_DATA_PARALLEL_GROUP", "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP")


def share_experts(und_ranks: int) -> None:
    """Let the first `und_ranks` of the expert-parallel ranks be replicas of each other, and the others too.

    Replaces megatron-core's expert data-parallel groups, which DDP, the distributed optimizer and checkpoints ask for.
    Every rank must call it, after `initialize` and before the model is wrapped.
    """
    expert_ranks = parallel_state.get_expert_model_parallel_world_size()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    # ranks of one stage are neighbours, and the expert-parallel index is the fastest one among them
    per_stage = dist.get_world_size() // stages
    for stage in range(stages):
        ranks = range(stage * per_stage, (stage + 1) * per_stage)
        for holds_und in (True, False):
            members = [rank for rank in ranks if (rank % expert_ranks < und_ranks) is holds_und]
            group, gloo = dist.new_group(members), dist.new_group(members, backend="gloo")
            if dist.get_rank() in members:
                for name in _SAME_EXPERTS:
                    setattr(parallel_state, name, group)
                    setattr(parallel_state, f"{name}_GLOO", gloo)
