"""All legal layouts of a model on a cluster that fit into memory, fastest first."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

from megabagel.config.checks import check_layout
from megabagel.config.errors import ConfigError
from megabagel.config.pipeline_split import TokenMix
from megabagel.config.schema import Config, ParallelConfig
from planning.budget import Budget, budget
from planning.cluster import Cluster
from planning.timing import Case, StepTime, step_time
from planning.work import load_of

RECOMPUTE = (None, "selective", "full")
SELECTIVE = ["core_attn", "mlp", "layernorm"]


@dataclass(frozen=True)
class Plan:
    """One layout with what it needs."""

    case: Case
    budget: Budget
    time: StepTime

    @property
    def fits(self) -> bool:
        return self.budget.total <= self.case.cluster.memory


def divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def layouts(config: Config, cluster: Cluster) -> Iterator[ParallelConfig]:
    """Candidates, not all of them legal: tensor x context ranks stay in a node, uneven pipelines are split `auto`."""
    model, gpus = config.model, cluster.gpus
    for tp in divisors(model.num_query_groups, cluster.per_node):
        for cp in divisors(model.num_attention_heads // tp, cluster.per_node // tp):
            for pp in divisors(model.num_layers, 16) + [8, 16]:
                if gpus % (tp * cp * pp):
                    continue
                dp = gpus // (tp * cp * pp)
                for vp in [None, *[n for n in (2, 4, 7) if pp > 1 and (model.num_layers // pp) % n == 0]]:
                    for ep in [1] if pp > 1 else [1, 2, 4, 8]:
                        for und in [None] if ep == 1 or model.has_sparse_experts else range(1, ep):
                            yield ParallelConfig(
                                tensor_model_parallel_size=tp,
                                sequence_parallel=tp > 1,
                                context_parallel_size=cp,
                                pipeline_model_parallel_size=pp,
                                virtual_pipeline_model_parallel_size=vp,
                                pipeline_split="even" if model.num_layers % pp == 0 else "auto",
                                expert_model_parallel_size=ep,
                                und_expert_ranks=und,
                                overlap_grad_reduce=dp * cp > 1,
                                overlap_param_gather=dp * cp > 1,
                            )


def with_layout(config: Config, parallel: ParallelConfig, recompute: str | None) -> Config:
    """A copy of `config` in this layout."""
    chosen = deepcopy(config)
    chosen.parallel = replace(parallel)
    chosen.training.recompute_granularity = recompute
    chosen.training.recompute_method, chosen.training.recompute_num_layers = "uniform", 1
    if recompute == "selective":
        # with FP8 a linear keeps its own copy of the norm's result
        chosen.training.recompute_modules = [m for m in SELECTIVE if config.kernels.fp8 is None or m != "layernorm"]
    return chosen


def plan(config: Config, cluster: Cluster, mix: TokenMix, lost: float, reserve: float, stored: bool = False) -> Plan:
    """What this layout needs. Raises ConfigError when it is not legal on the cluster."""
    check_layout(config, cluster.gpus)
    case = Case(config, cluster, mix, lost, stored)
    load = load_of(config, mix, case.sizes, config.training.global_batch_size)
    return Plan(case, budget(config, cluster.gpus, load, reserve), step_time(case))


def search(config: Config, cluster: Cluster, mix: TokenMix, lost: float, reserve: float, stored: bool = False):
    """Plans that fit, fastest step first, and the one that needs least memory whether it fits or not."""
    plans, smallest = [], None
    for parallel in layouts(config, cluster):
        for recompute in RECOMPUTE:
            try:
                one = plan(with_layout(config, parallel, recompute), cluster, mix, lost, reserve, stored)
            except ConfigError:
                continue
            if smallest is None or one.budget.total < smallest.budget.total:
                smallest = one
            if one.fits:
                plans.append(one)
    # between equals the simpler layout: fewer ranks per replica
    plans.sort(key=lambda p: (p.time.step, -p.case.sizes.dp))
    return plans, smallest
