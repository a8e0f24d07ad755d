"""Finds parallel layouts of a model on a cluster: what fits, how fast a step should be, and the configuration to run.

It starts nothing and needs no GPU: memory comes from the shapes (compared with real runs by tools/measure_layouts.py),
time from a roofline fitted to published steps. What was measured and what was assumed: docs/planning.md. Settings of
the model and the data can be overridden as in training (--model.num_layers 40). The last line is JSON.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

from layouts.choice import parse_choice  # noqa: E402
from planning.cluster import GPUS, Cluster, cluster_of  # noqa: E402
from planning.failures import Schedule, at_sizes, best_interval, simulate  # noqa: E402
from planning.peers import fitted_loss  # noqa: E402
from planning.report import (  # noqa: E402
    failure_table,
    interval_line,
    layout_name,
    memory_lines,
    plan_table,
    time_lines,
)
from planning.search import Plan, plan, search, with_layout  # noqa: E402

from megabagel.config.errors import ConfigError  # noqa: E402
from megabagel.config.load import load_config, to_yaml  # noqa: E402
from megabagel.config.pipeline_split import RECIPE, TokenMix  # noqa: E402
from megabagel.config.schema import Config, ParallelConfig  # noqa: E402

EXAMPLE = """examples:
  python tools/plan_parallelism.py --model bagel_7b_mot --gpu H100 --gpus 32
  python tools/plan_parallelism.py --model BAGEL-7B-MoT --gpu H200 --gpus 512 --packs 1024 --write run.yaml
  python tools/plan_parallelism.py --model bagel_7b_mot --gpu H100 --gpus 64 --layout tp=4,sp,overlap,recompute=full
  python tools/plan_parallelism.py --model bagel_7b_mot --gpu H100 --gpus 64 --mix vit=10,vae=80,ce=2,mse=60
  python tools/plan_parallelism.py --simulate --gpu H100 --gpus 16384 --mtbf 50000 --stall 5 --durable 60 --restart 300
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="bagel_7b_mot", metavar="M", help="preset, YAML file or BAGEL folder (bagel_7b_mot)")
    add("--gpu", default="H100", help=f"one of {', '.join(GPUS)}, or another name with all its numbers (H100)")
    add("--gpus", type=int, default=8, metavar="N", help="GPUs in all (8)")
    for name, text in (
        ("memory", "GB of a GPU"),
        ("peak", "dense bf16 TFLOP/s of a GPU"),
        ("bandwidth", "TB/s of its memory"),
        ("nvlink", "GB/s that it sends inside a node"),
        ("network", "GB/s that it sends to other nodes"),
    ):
        add(f"--{name}", type=float, metavar="X", help=text)
    add("--per-node", type=int, metavar="N", help="GPUs that NVLink connects")
    add("--packs", type=int, metavar="N", help="packs of a step over all replicas (one per GPU)")
    add("--mix", default="", help="of 100 tokens: vit=33,vae=63,ce=2,mse=42 and the keys a token sees, keys=6000")
    add("--stored-latents", action="store_true", help="pictures are read encoded: no autoencoder in a step")
    add("--lost", type=float, metavar="X", help="time beyond the model, as a share (fitted to a published BAGEL run)")
    add("--reserve", type=float, default=6, metavar="GB", help="CUDA context, NCCL, fragments (6)")
    add("--layout", action="append", metavar="L", help="these layouts instead of a search; may be repeated")
    add("--top", type=int, default=10, metavar="N", help="layouts to list (10)")
    add("--write", metavar="FILE", help="the configuration of the first layout, or of --rank")
    add("--rank", type=int, default=1, metavar="N", help="which layout of the list to write (1)")
    add("--simulate", action="store_true", help="a long run with failures instead of layouts")
    add("--mtbf", type=float, default=50_000, metavar="HOURS", help="between failures of one GPU (50000)")
    add("--stall", type=float, default=5, metavar="S", help="that training stands still for a checkpoint (5)")
    add("--durable", type=float, default=60, metavar="S", help="until a checkpoint can be loaded (60)")
    add("--restart", type=float, default=300, metavar="S", help="from a failure to the next new step (300)")
    add("--step", type=float, metavar="S", help="--simulate: seconds of a step (10)", default=10)
    add("--interval", type=float, metavar="S", help="--simulate: also this interval between checkpoints")
    options, options.overrides = parser.parse_known_args(argv)
    return options


def cluster_from(options: argparse.Namespace) -> Cluster:
    scale = {"memory": 1e9, "peak": 1e12, "bandwidth": 1e12, "nvlink": 1e9, "network": 1e9}
    given = {name: value * by for name, by in scale.items() if (value := getattr(options, name)) is not None}
    return cluster_of(options.gpu, options.gpus, per_node=options.per_node, **given)


def mix_from(text: str) -> TokenMix:
    """Raises ValueError with one sentence."""
    given = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in vars(RECIPE) or not value.isdecimal():
            raise ValueError(f"`{part}` in --mix is unknown; allowed are {', '.join(f'{n}=N' for n in vars(RECIPE))}.")
        given[name] = int(value)
    mix = replace(RECIPE, **given)
    if mix.vit + mix.vae > 100 or mix.mse > mix.vae:
        raise ValueError(f"--mix {text} has more than 100 ViT and VAE tokens of 100, or more MSE rows than VAE tokens.")
    return mix


def config_from(options: argparse.Namespace) -> Config:
    model = ["--model.folder", options.model] if Path(options.model).is_dir() else ["--config", options.model]
    config = load_config([*model, *options.overrides])
    config.training.global_batch_size = options.packs or options.gpus
    if config.training.params_dtype != "bf16":
        raise ConfigError("the planner counts bf16 training; set --training.params_dtype bf16.")
    return config


def plans_from(options: argparse.Namespace, config: Config, cluster: Cluster) -> list[Plan]:
    """Those to list. Raises ConfigError where none is legal or none fits."""
    mix = mix_from(options.mix)
    lost = fitted_loss() if options.lost is None else options.lost
    settings = (cluster, mix, lost, options.reserve * 1e9, options.stored_latents)
    if options.layout:
        plans = []
        for choice in map(parse_choice, options.layout):
            chosen = with_layout(config, ParallelConfig(**choice.parallel), choice.recompute)
            if choice.experts is not None:
                chosen.model.und_num_experts = chosen.model.gen_num_experts = choice.experts
            plans.append(plan(chosen, *settings))
        return plans
    plans, smallest = search(config, *settings)
    if plans:
        return plans
    packs = config.training.global_batch_size
    if smallest is None:
        raise ConfigError(f"no layout of {cluster.gpus} GPUs is legal with {packs} packs a step; change --packs.")
    needed = f"{layout_name(smallest.case.config)} needs least, {smallest.budget.total / 1e9:.1f} GB"
    raise ConfigError(
        f"no layout fits into {cluster.memory / 1e9:.0f} GB on {cluster.gpus} GPUs: {needed}; take more GPUs or lower "
        f"data.max_num_tokens."
    )


def run_plan(options: argparse.Namespace) -> dict:
    config, cluster = config_from(options), cluster_from(options)
    plans = plans_from(options, config, cluster)
    shown = plans[: options.top]
    count = sum(one.fits for one in plans)
    print(f"{cluster.gpus} x {cluster.gpu}, {config.training.global_batch_size} packs a step; {count} layouts fit\n")
    print(plan_table(shown))
    if not 1 <= options.rank <= len(plans):
        raise ConfigError(f"--rank {options.rank} is not in the list of {len(plans)} layouts; give 1 to {len(plans)}.")
    chosen = plans[options.rank - 1]
    name = layout_name(chosen.case.config)
    print(f"\n{name}\n{memory_lines(chosen.budget, cluster.memory)}\n{time_lines(chosen)}")
    if options.write:
        Path(options.write).write_text(to_yaml(chosen.case.config), encoding="utf-8")
        print(f"wrote {options.write}: python -m megabagel.train --config {options.write}")
    return {
        "layout": name,
        "memory_gb": round(chosen.budget.total / 1e9, 2),
        "step_s": round(chosen.time.step, 3),
        "mfu": round(chosen.time.mfu, 4),
    }


def run_simulation(options: argparse.Namespace) -> dict:
    schedule = Schedule(options.gpus, options.mtbf * 3600, options.stall, options.durable, options.restart)
    sizes = sorted({n for n in (256, 1024, 4096, 16384) if n < options.gpus} | {options.gpus})
    rows = at_sizes(schedule, options.step, sizes)
    print(failure_table(rows))
    if options.interval:
        useful = simulate(schedule, options.interval).useful
        print(f"\nwith {options.interval / 60:.1f} minutes between checkpoints: {100 * useful:.2f}%")
    interval, effective = best_interval(schedule, options.step)
    print("\n" + interval_line(schedule, interval, options.step))
    return {"interval_s": interval, "effective": round(effective.useful, 4)}


def main(argv: list[str]) -> int:
    options = parse(argv)
    try:
        result = run_simulation(options) if options.simulate else run_plan(options)
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n" + json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
