"""Seconds of a step of a layout: computation, communication that nothing hides, idle pipeline, imbalance.

A roofline with shares of the data sheet that kernels reach, and one factor for everything else that a real step loses,
which `peers.py` fits to published measurements.
"""

from dataclasses import dataclass

from layouts.memory_formula import BF16, Sizes, rank_groups, sizes_of
from layouts.traffic_formula import Load, traffic

from megabagel.config.pipeline_split import TokenMix, stage_layers
from megabagel.config.schema import Config
from planning.cluster import Cluster
from planning.work import PackWork, load_of, pack_work, typical

MATRICES, ATTENTION, ENCODERS = (
    0.70,
    0.45,
    0.35,
)  # of the bf16 peak: large GEMMs, packed attention, convolutions and ViT
MEMORY, LINKS = 0.80, 0.80  # of the data sheet's bandwidths
PACK_IMBALANCE = {"balanced": 1.01, "best_fit": 1.10, "greedy": 1.10}  # slowest pack of a step over the mean
ENCODE_IMBALANCE = 1.03  # pictures spread over a replica's ranks, tools/bench_encode_balance.py
_VIT_IMBALANCE = ((1, 1.0), (2, 1.08), (4, 1.6), (8, 3.2), (28, 8.0))  # of a ViT that trains, by tensor x context ranks


@dataclass(frozen=True)
class StepTime:
    """Seconds. Parts that are hidden are in no field; `step` is the sum of all."""

    compute: float
    encode: float
    tensor: float
    context: float
    experts: float
    pipeline: float  # sends and receives
    data: float
    bubble: float
    imbalance: float
    optimizer: float
    lost: float
    mfu: float

    @property
    def step(self) -> float:
        return sum(value for name, value in vars(self).items() if name != "mfu")


@dataclass(frozen=True)
class Case:
    """One layout on one cluster, and how much a real step loses beside what is modelled, as a share of that."""

    config: Config
    cluster: Cluster
    mix: TokenMix
    lost: float
    stored: bool = False  # latents are read encoded

    @property
    def recomputes_mlp(self) -> bool:
        training = self.config.training
        return training.recompute_granularity == "selective" and "mlp" in training.recompute_modules

    @property
    def sizes(self) -> Sizes:
        return sizes_of(self.config.parallel, self.cluster.gpus)


def step_time(case: Case) -> StepTime:
    """Seconds of a step of `training.global_batch_size` packs, and MFU by mask-aware model FLOPs."""
    config, cluster, sizes = case.config, case.cluster, case.sizes
    packs = config.training.global_batch_size / sizes.dp
    whole = load_of(config, case.mix, sizes, config.training.global_batch_size)
    load = typical(config, whole, sizes)
    work = pack_work(config, case.mix, config.data.expected_num_tokens, case.stored)
    stretch = load.rows / config.data.expected_num_tokens  # padded rows are multiplied, too
    stages = _stage_seconds(case, work, load, stretch)
    slowest = max(stages)
    compute = sum(stages) / len(stages) * packs
    uneven = (slowest - sum(stages) / len(stages)) * packs
    links = _links(case, load)
    per_pack = slowest + sum(links.values()) / packs
    bubble = (sizes.pp - 1) / sizes.vp * per_pack
    data = _data(case, slowest, packs)
    pack_imbalance = (PACK_IMBALANCE[config.data.packing] - 1) * compute if sizes.dp > 1 else 0.0
    spread = sizes.tp * sizes.cp * sizes.pp
    encoders = work.autoencoder + (work.vision if _frozen_vit(config) else 0)
    encode = packs * encoders / spread / (cluster.peak * ENCODERS) * (ENCODE_IMBALANCE if spread > 1 else 1)
    optimizer = _optimizer(case, packs)
    known = compute + encode + sum(links.values()) + data + bubble + uneven + pack_imbalance + optimizer
    step = known * (1 + case.lost)
    model = work.model * config.training.global_batch_size
    return StepTime(
        compute, encode, links["tensor"], links["context"], links["experts"], links["pipeline"], data, bubble,
        uneven + pack_imbalance, optimizer, known * case.lost, model / (step * cluster.peak * cluster.gpus),
    )  # fmt: skip


def _frozen_vit(config: Config) -> bool:
    return config.model.freeze_vit or config.model.freeze_und


def _stage_seconds(case: Case, work: PackWork, load: Load, stretch: float) -> list[float]:
    """Of one pack on each pipeline rank, recomputation included."""
    config, sizes, peak = case.config, case.sizes, case.cluster.peak
    model, layers = config.model, config.model.num_layers
    of_linears, of_attention, of_memory = _again(config)
    ranks = sizes.tp * sizes.cp
    uneven = _expert_imbalance(config, sizes, load)
    mlp = _mlp_share(config)
    linears = work.linears * stretch * of_linears * (1 - mlp + mlp * uneven) / (peak * MATRICES)
    attention = work.attention * of_attention / (peak * ATTENTION)
    h, kv = model.hidden_size, model.num_query_groups * model.hidden_size // model.num_attention_heads
    shards = sizes.tp if config.parallel.sequence_parallel else 1
    # norms, residuals, rotary embedding and gated activation read and write each value; twice that backward
    moved = 3 * load.rows / sizes.cp * (24 * h / shards + (4 * (h + 2 * kv) + 6 * model.ffn_hidden_size) / sizes.tp)
    fused = moved * of_memory / (case.cluster.bandwidth * MEMORY)
    layer = (linears + attention) / ranks / layers + fused
    first = work.inputs * stretch / ranks / (peak * MATRICES)
    if not _frozen_vit(config):
        first += work.vision / ranks / (peak * ENCODERS) * vit_imbalance(ranks)
    last = work.heads / ranks / (peak * MATRICES)
    per_stage = stage_layers(model, config.data, config.parallel)
    stages = [sum(per_stage[rank :: sizes.pp]) * layer for rank in range(sizes.pp)]
    stages[0] += first
    stages[-1] += last
    return stages


def _mlp_share(config: Config) -> float:
    """Of a layer's linears."""
    model = config.model
    kv = model.num_query_groups * model.hidden_size // model.num_attention_heads
    mlp = 3 * model.ffn_hidden_size
    return mlp / (mlp + 2 * model.hidden_size + 2 * kv)


def _again(config: Config) -> tuple[float, float, float]:
    """How much longer recomputation makes linears, attention and what moves memory."""
    training = config.training
    if training.recompute_granularity == "full":
        return 4 / 3, 4 / 3, 4 / 3
    if training.recompute_granularity == "selective":
        named = training.recompute_modules
        mlp = 1 + _mlp_share(config) / 3 if "mlp" in named else 1
        return mlp, 4 / 3 if "core_attn" in named else 1, 7 / 6
    return 1, 1, 1


def _expert_imbalance(config: Config, sizes: Sizes, load: Load) -> float:
    """Rows of the modality expert that has most per rank over the mean."""
    if sizes.ep == 1 or config.model.has_sparse_experts:
        return 1.0
    und = config.parallel.und_expert_ranks or sizes.ep // 2
    return max(load.und_rows / und, load.gen_rows / (sizes.ep - und)) * sizes.ep / load.rows


def vit_imbalance(ranks: int) -> float:
    """Between the measured points, linear."""
    for (low, at_low), (high, at_high) in zip(_VIT_IMBALANCE, _VIT_IMBALANCE[1:], strict=False):
        if ranks <= high:
            return at_low + (at_high - at_low) * (ranks - low) / (high - low)
    return _VIT_IMBALANCE[-1][1]


def _links(case: Case, load: Load) -> dict[str, float]:
    """Seconds of a step that communication inside a replica is not hidden."""
    config, cluster, sizes = case.config, case.cluster, case.sizes
    empty = Load(0, 0, 0)
    alone, sent = traffic(config, cluster.gpus, empty), traffic(config, cluster.gpus, load)
    rings = sum(sent.get(k, 0) - alone.get(k, 0) for k in ("all-gather", "reduce-scatter", "all-reduce"))
    forwards = 2 if config.training.recompute_granularity == "full" else 1.5 if case.recomputes_mlp else 1
    if config.parallel.sequence_parallel:
        # backward, the inputs' second gather and the reduce-scatter run beside matrix products
        shown = (4 * forwards + 2) / (4 * forwards + 6)
    else:
        shown = forwards / (forwards + 1)
    exchanged = {"context": 0.0, "experts": 0.0}
    if total := sent.get("all-to-all", 0):
        group = "experts" if sizes.ep > 1 else "context"
        ranks, stride = (sizes.ep, 1) if group == "experts" else (sizes.cp, sizes.tp)
        exchanged[group] = total / (cluster.exchange(ranks, stride) * LINKS)
    across = cluster.ring(sizes.pp, sizes.tp * sizes.cp * sizes.dp) * LINKS
    p2p = sent.get("p2p", 0) / across * (0.2 if sizes.vp > 1 else 1)  # interleaved, most of it runs beside computation
    tensor = rings * shown / (cluster.ring(sizes.tp, 1) * LINKS) if sizes.tp > 1 else 0.0
    return {"tensor": tensor, "pipeline": p2p, **exchanged}


def _data(case: Case, pack_seconds: float, packs: float) -> float:
    """Gradients reduced beside the last pack's backward pass, parameters gathered beside the first forward pass."""
    config, cluster, sizes = case.config, case.cluster, case.sizes
    bandwidth = cluster.ring(sizes.dp * sizes.cp, sizes.tp) * LINKS
    trained = max(sum(g.trained for g in groups) for stage in _groups(case) for groups in stage)
    ranks = sizes.dp * sizes.cp
    share = (ranks - 1) / ranks
    reduce, gather = (size * trained * share / bandwidth for size in (4, BF16))
    if config.parallel.overlap_grad_reduce:
        reduce = max(0.1 * reduce, reduce - 0.6 * pack_seconds)  # the last bucket has nothing to hide behind
    if config.parallel.overlap_param_gather:
        gather = max(0.1 * gather, gather - 0.3 * pack_seconds)
    return reduce + gather


def _groups(case: Case) -> list:
    return rank_groups(case.config.model, case.config.parallel, case.cluster.gpus)


def _optimizer(case: Case, packs: float) -> float:
    """Memory traffic: gradients are cleared, added to after each pack (10 bytes a parameter) and measured; shards of
    weights, moments and average are read and written once."""
    ranks = [groups for stage in _groups(case) for groups in stage]
    trained = max(sum(g.trained for g in groups) for groups in ranks)
    shard = max(sum(g.trained / g.ranks for g in groups) for groups in ranks)
    average = 12 if case.config.optimizer.ema_decay is not None else 0
    return (trained * (4 + 10 * packs) + shard * (34 + average)) / (case.cluster.bandwidth * MEMORY)
