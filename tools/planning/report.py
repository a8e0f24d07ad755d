"""Plans as Markdown tables, and a layout as it is written on the command line."""

from dataclasses import fields

from layouts.choice import SIZES
from layouts.tables import table

from megabagel.config.schema import Config, ParallelConfig
from planning.budget import Budget
from planning.failures import Effective, Schedule, daly, young
from planning.search import Plan

_TIMES = ("compute", "encode", "tensor", "context", "experts", "pipeline", "data", "bubble", "imbalance", "optimizer")


def layout_name(config: Config) -> str:
    """`tp=2,sp,recompute=full`: what --layout takes."""
    parallel, default = config.parallel, ParallelConfig()
    parts = [
        f"{short}={getattr(parallel, name)}"
        for short, name in SIZES.items()
        if getattr(parallel, name) != getattr(default, name)
    ]
    parts += ["sp"] * parallel.sequence_parallel + ["overlap"] * parallel.overlap_param_gather
    parts += ["auto"] * (parallel.pipeline_split == "auto")
    if (recompute := config.training.recompute_granularity) is not None:
        parts.append(f"recompute={recompute}")
    return ",".join(parts) or "dp"


def plan_table(plans: list[Plan]) -> str:
    """One line per plan: what it needs and how fast it is."""
    rows = []
    for number, plan in enumerate(plans, 1):
        config, time, dp = plan.case.config, plan.time, plan.case.sizes.dp
        hidden = time.tensor + time.context + time.experts + time.pipeline + time.data
        tokens = config.data.expected_num_tokens * config.training.global_batch_size / plan.case.cluster.gpus
        rows.append(
            [str(number), f"`{layout_name(config)}`", str(dp), str(config.training.global_batch_size // dp),
             f"{plan.budget.total / 1e9:.1f}" + ("" if plan.fits else " (too much)"), f"{time.compute:.2f}",
             f"{hidden:.2f}", f"{time.bubble + time.imbalance:.2f}", f"{time.step:.2f}",
             f"{tokens / time.step:.0f}", f"{100 * time.mfu:.1f}%"]
        )  # fmt: skip
    head = ["", "layout", "DP", "packs", "GB", "compute s", "waits for links s", "idle s", "step s", "tokens/s/GPU"]
    return table([*head, "MFU"], rows)


def memory_lines(budget: Budget, memory: float) -> str:
    """GB of each part of the fullest GPU."""
    parts = [f"{field.name} {getattr(budget, field.name) / 1e9:.1f}" for field in fields(budget)]
    return f"GB of the fullest GPU: {', '.join(parts)}; {budget.total / 1e9:.1f} of {memory / 1e9:.0f}"


def time_lines(plan: Plan) -> str:
    """Seconds of each part of a step."""
    parts = [f"{name} {getattr(plan.time, name):.2f}" for name in _TIMES]
    return f"seconds of a step: {', '.join(parts)}, everything else {plan.time.lost:.2f}; {plan.time.step:.2f}"


def failure_table(rows: list[tuple[int, float, float, Effective]]) -> str:
    """Effective training time by cluster size, each with its best interval."""
    cells = [
        [str(gpus), f"{effective.failures_per_day:.1f}", f"{interval / 60:.1f}", f"{by_daly / 60:.1f}",
         *(f"{100 * part:.2f}%" for part in (effective.useful, effective.stall, effective.repeated, effective.down))]
        for gpus, interval, by_daly, effective in rows
    ]  # fmt: skip
    head = ["GPUs", "failures a day", "best interval min", "Daly's", "effective time", "stall", "done again", "down"]
    return table(head, cells)


def interval_line(schedule: Schedule, interval: float, step: float | None) -> str:
    """The best interval in time and, where the step is known, in steps."""
    steps = f", every {max(1, round(interval / step))} steps of {step:.2f} s" if step else ""
    return (
        f"best checkpoint interval on {schedule.gpus} GPUs: {interval / 60:.1f} minutes{steps} (Young "
        f"{young(schedule) / 60:.1f}, Daly {daly(schedule) / 60:.1f}); the job fails every "
        f"{schedule.mean_uptime / 3600:.1f} hours."
    )
