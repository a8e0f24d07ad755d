"""The distributed optimizer in a checkpoint: whole tensors under the names of their parameters, and the step count.

A rank may have one optimizer or several (experts have their own): a checkpoint does not tell, so any layout loads it.
Rates, betas, eps and decay belong to the configuration and are not saved.
"""

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

# Whole optimizer tensors, which any layout can load, made on the first data-parallel rank.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


def steps_done(optimizer: MegatronOptimizer) -> int:
    """Updates that Adam's bias correction has counted."""
    return max((int(group["step"]) for group in optimizer.param_groups if "step" in group), default=0)


def for_saving(optimizer: MegatronOptimizer, model_state: ShardedStateDict) -> dict[int, ShardedStateDict]:
    """Main parameters and moments of each of this rank's optimizers; ranks that write none of them say nothing."""
    states = {
        number: part.sharded_state_dict(model_state, metadata=METADATA)["param_state"]
        for number, part in enumerate(_parts(optimizer))
    }
    return {number: state for number, state in states.items() if state is not None}


def for_loading(optimizer: MegatronOptimizer, model_state: ShardedStateDict) -> dict[int, ShardedStateDict]:
    """Requests for the main parameters and moments of this rank's parameters."""
    return {
        number: part.sharded_state_dict(model_state, is_loading=True, metadata=METADATA)["param_state"]
        for number, part in enumerate(_parts(optimizer))
    }


def put(optimizer: MegatronOptimizer, loaded: dict[int, dict], steps: int) -> None:
    """Take this rank's shards out of what was loaded for `for_loading`'s requests; `steps`: see `steps_done`."""
    for number, part in enumerate(_parts(optimizer)):
        state = part.state_dict()
        for group in state["optimizer"]["param_groups"]:
            group["step"] = steps
        sharding = METADATA["distrib_optim_sharding_type"]
        part.load_state_dict({**state, "param_state": loaded[number], "param_state_sharding_type": sharding})


def _parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    return [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
