"""Rules about experts: modality experts (und's and gen's MLPs on different ranks) and sparse experts inside a stream.

The number of ranks that hold experts depends on the number of processes: that rule is in `checks_parallel.py`.
"""

from collections.abc import Iterator

from megabagel.config.errors import divisors, listed
from megabagel.config.schema import Config


def expert_faults(config: Config) -> Iterator[str]:
    """Faults in order of importance."""
    numbers = {"und_num_experts": config.model.und_num_experts, "gen_num_experts": config.model.gen_num_experts}
    sparse = {name: experts for name, experts in numbers.items() if experts is not None}
    yield from (_sparse(config, sparse) if sparse else _modality(config))


def _sparse(config: Config, sparse: dict[str, int]) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    ep, topk = parallel.expert_model_parallel_size, model.moe_router_topk
    if model.layer_variant == "dense" and model.gen_num_experts is not None:
        yield (
            f"model.gen_num_experts is {model.gen_num_experts}, but with model.layer_variant dense both streams use "
            f"und's MLP; set und_num_experts alone, or layer_variant to mot or moe."
        )
    for name, experts in sparse.items():
        if experts < 2:
            yield f"model.{name} is {experts}, but sparse experts are at least 2; set null for one dense MLP."
        if topk > experts:
            allowed = listed(range(2, experts + 1))
            yield f"model.moe_router_topk {topk} is more than model.{name} {experts}; allowed are {allowed}."
        if experts % ep:
            yield (
                f"model.{name} {experts} does not divide by parallel.expert_model_parallel_size {ep}; "
                f"{divisors(*sparse.values())}."
            )
    if topk == 1:
        yield (
            "model.moe_router_topk is 1, but the weights of a token's experts are normalised to sum 1, so the router "
            "would learn nothing from the losses; set 2 or more."
        )
    if parallel.und_expert_ranks is not None:
        yield (
            f"parallel.und_expert_ranks {parallel.und_expert_ranks} divides ranks between und's and gen's dense MLPs, "
            f"but model.{next(iter(sparse))} makes sparse experts, which every expert-parallel rank holds a share of; "
            f"leave und_expert_ranks out."
        )


def _modality(config: Config) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    ep, und_ranks = parallel.expert_model_parallel_size, parallel.und_expert_ranks
    if ep == 1:
        if und_ranks is not None:
            yield (
                f"parallel.und_expert_ranks {und_ranks} divides the expert-parallel ranks between und's and gen's "
                f"MLPs, but parallel.expert_model_parallel_size is 1; raise that to 2 or more or leave "
                f"und_expert_ranks out."
            )
        return
    if model.layer_variant == "dense":
        yield (
            f"parallel.expert_model_parallel_size {ep} needs several MLPs per layer, but model.layer_variant dense has "
            f"one; set layer_variant to mot or moe, make sparse experts with model.und_num_experts, or set the size "
            f"to 1."
        )
    if und_ranks is not None and not 1 <= und_ranks < ep:
        yield (
            f"parallel.und_expert_ranks is {und_ranks}, but of the {ep} expert-parallel ranks "
            f"(expert_model_parallel_size) at least one must hold und's MLPs and one gen's; "
            f"allowed are {listed(range(1, ep))}."
        )
    if model.freeze_und:
        yield (
            f"model.freeze_und leaves the ranks that hold und's MLPs (parallel.expert_model_parallel_size {ep} without "
            f"sparse experts) no expert to train; set the size to 1, set freeze_und to false, or make sparse experts "
            f"with model.gen_num_experts."
        )
