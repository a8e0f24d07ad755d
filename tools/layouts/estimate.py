"""The formulas applied to a preset on any number of GPUs: GB per rank and seconds of a step, derived, not measured.

The machine is assumed, see the constants. Nothing here overlaps unless it says so; real runs differ.
"""

from layouts.choice import Choice, check_layout
from layouts.memory_formula import Sizes, activation_bytes_per_row, memory, sizes_of
from layouts.traffic_formula import Load, traffic
from megabagel.config.load import load_config
from megabagel.config.pipeline_split import RECIPE, stage_costs, stage_layers
from megabagel.config.schema import Config

PEAK_FLOPS, REACHED = 989e12, 0.45  # H100 SXM bf16 dense; share of it that large matrix products reach
NODE = 8  # GPUs that NVLink connects
NVLINK, INFINIBAND = 300e9, 40e9  # bytes per second that a GPU sends, of 450e9 and 50e9 on paper
TILE = 16


def load_of(config: Config, sizes: Sizes, packs: int) -> Load:
    """Full packs of the token mix that `pipeline_split.TokenMix` describes."""
    tile = TILE * sizes.tp * sizes.cp
    rows = -(-config.data.max_num_tokens // tile) * tile
    gen = rows * RECIPE.vae // 100 // tile * tile
    return Load(rows - gen, gen, packs)


def activation_bytes(config: Config, sizes: Sizes, load: Load) -> float:
    """On the first pipeline rank, which keeps most micro-batches: what autograd keeps, and one layer computed again."""
    parallel, recompute = config.parallel, config.training.recompute_granularity
    layers = sum(stage_layers(config.model, None, parallel)[:: sizes.pp])
    packs = load.packs // sizes.dp
    # micro-batches that wait for their backward pass; interleaving starts (pp - 1) / vp more
    waiting = 1 if sizes.pp == 1 else min(packs, sizes.pp + (sizes.pp - 1) * (sizes.vp > 1) / sizes.vp)

    def per_row(kind: str | None) -> float:
        return activation_bytes_per_row(config.model, sizes.tp, parallel.sequence_parallel, kind)

    rows = load.rows / sizes.cp
    live = 0 if recompute is None else per_row(None)
    return rows * (layers * waiting * per_row(recompute) + live)


def seconds(config: Config, sizes: Sizes, processes: int, load: Load) -> dict[str, float]:
    """Parts of a step: computation, communication by group, the share of time that the pipeline idles; and the step, if
    data parallelism hides behind half of the computation (the backward pass proper) and nothing else hides."""
    packs = load.packs / sizes.dp
    per_layer, *ends = stage_costs(config.model, config.data)
    flops = (config.model.num_layers * per_layer + sum(ends)) * load.rows / 100 * packs
    again = {"full": 4 / 3, "selective": 1.3, None: 1}[config.training.recompute_granularity]
    compute = flops * again / (sizes.tp * sizes.cp * sizes.pp) / (PEAK_FLOPS * REACHED)
    # data parallelism alone sends what a step without tokens sends
    state = traffic(config, processes, Load(0, 0, 0))
    sent = traffic(config, processes, load)
    inside = NVLINK if sizes.tp * sizes.cp <= NODE else INFINIBAND
    across = NVLINK if processes <= NODE else INFINIBAND
    exchange = NVLINK if max(sizes.tp * sizes.cp, sizes.ep) <= NODE else INFINIBAND
    model = sum(sent.get(kind, 0) - state.get(kind, 0) for kind in ("all-gather", "reduce-scatter", "all-reduce"))
    parts = {
        "compute": compute,
        "TP": model / inside,
        "CP, EP": sent.get("all-to-all", 0) / exchange,
        "PP": sent.get("p2p", 0) / across,
    }
    bubble = (sizes.pp - 1) / (packs * sizes.vp + sizes.pp - 1)
    data = (state.get("reduce-scatter", 0) + state.get("all-gather", 0)) / across
    step = sum(parts.values()) / (1 - bubble) + max(0, data - compute / 2)
    return {**parts, "DP": data, "bubble": bubble, "step": step}


def estimate(preset: str, choices: dict[str, Choice], processes: int, packs: int) -> str:
    """A Markdown table: a line per layout, for steps of `packs` packs over all replicas.

    Raises ConfigError when a layout is not legal.
    """
    from layouts.tables import table

    rows = []
    for name, choice in choices.items():
        config = choice.apply(load_config(["--config", preset]))
        config.training.global_batch_size = packs
        check_layout(config, processes)
        sizes = sizes_of(config.parallel, processes)
        load = load_of(config, sizes, packs)
        state = memory(config.model, config.parallel, processes)
        kept = activation_bytes(config, sizes, load)
        times = seconds(config, sizes, processes, load)
        cells = [state.parameters, state.gradients, state.optimizer + state.average, kept, state.total + kept]
        rows.append(
            [f"`{name}`", str(sizes.dp), f"{load.packs * load.rows / 1e6:.2f}", *(f"{c / 1e9:.1f}" for c in cells)]
            + [f"{times[k]:.2f}" for k in ("compute", "TP", "CP, EP", "PP", "DP")]
            + [f"{100 * times['bubble']:.0f}%", f"{times['step']:.2f}"]
        )  # fmt: skip
    head = ["layout", "DP", "M rows a step", "weights", "gradients", "optimizer + EMA", "activations", "GB in all"]
    return table(head + ["compute s", "TP s", "CP, EP s", "PP s", "DP s", "bubble", "step s"], rows)
