"""Bytes per rank from the shapes alone: weights, gradients, optimizer state, moving average and kept activations.

Pure arithmetic on the configuration, written down independently of the model's code, which it is compared with.
"""

from dataclasses import dataclass, fields

from megabagel.config.pipeline_split import stage_layers
from megabagel.config.schema import ModelConfig, ParallelConfig, VisionConfig

MAIN_AND_MOMENTS, GRADIENT, AVERAGE, BF16 = 12, 4, 4, 2  # bytes per parameter
_TIME_CHANNELS = 256


@dataclass(frozen=True)
class Sizes:
    """Parallel sizes of `processes` ranks; `dp` is what they leave."""

    tp: int
    pp: int
    vp: int
    cp: int
    dp: int
    ep: int

    @property
    def per_stage(self) -> int:
        """Ranks that hold one pipeline stage."""
        return self.tp * self.cp * self.dp


def sizes_of(parallel: ParallelConfig, processes: int) -> Sizes:
    """Raises ValueError when the processes do not divide into replicas."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, ep = parallel.context_parallel_size, parallel.expert_model_parallel_size
    if processes % (tp * pp * cp):
        raise ValueError(
            f"{processes} processes do not divide into replicas of {tp * pp * cp} ranks "
            f"(tensor {tp} x pipeline {pp} x context {cp})."
        )
    vp = parallel.virtual_pipeline_model_parallel_size or 1
    return Sizes(tp, pp, vp, cp, processes // (tp * pp * cp), ep)


@dataclass(frozen=True)
class Group:
    """Parameters of a rank that are reduced over, and whose optimizer state is sharded over, `ranks` ranks.

    `frozen` of them have neither gradients nor optimizer state.
    """

    parameters: float
    ranks: float
    frozen: float = 0.0

    @property
    def trained(self) -> float:
        return self.parameters - self.frozen


def vision_parameters(vit: VisionConfig, hidden: int) -> tuple[int, int]:
    """Tower, connector."""
    width, ffn = vit.hidden_size, vit.ffn_hidden_size
    layer = 4 * (width**2 + width) + 2 * width * ffn + ffn + width + 4 * width
    embedding = 3 * vit.patch_size**2 * width + width + vit.max_num_patch_per_side**2 * width
    tower = embedding + vit.num_layers * layer + 2 * width
    return tower, width * hidden + hidden + hidden**2 + hidden


def attention_parameters(model: ModelConfig, tp: int) -> float:
    """One stream's part of a layer on one rank without the MLP: projections and norms."""
    h = model.hidden_size
    head = h // model.num_attention_heads
    qkv = h + 2 * model.num_query_groups * head
    norms = 2 * h + (2 * head if model.qk_layernorm else 0)
    return (h * qkv + qkv + h * h) / tp + norms


@dataclass
class _Parts:
    """Adds up parameters and those of them that do not train."""

    held: float = 0.0
    frozen: float = 0.0

    def add(self, parameters: float, trains: bool) -> None:
        self.held += parameters
        self.frozen += 0 if trains else parameters

    def over(self, ranks: float) -> Group:
        return Group(self.held, ranks, self.frozen)


def stage_groups(model: ModelConfig, sizes: Sizes, layers: int, ends: tuple[bool, bool], und_ranks: int | None):
    """Parameter groups of a rank with `layers` layers, one list per kind of rank (holders of und's and of gen's MLPs).

    `ends`: whether the stage is the first and the last one.
    """
    trains = (not (model.freeze_llm or model.freeze_und), not model.freeze_llm)  # und's layers, gen's
    dense = _Parts()
    _add_ends(dense, model, sizes.tp, ends)
    for of_und in (True, *([False] if model.layer_variant == "mot" else [])):
        dense.add(layers * attention_parameters(model, sizes.tp), trains[0 if of_und else 1])
    h, mlp = model.hidden_size, 3 * model.hidden_size * model.ffn_hidden_size
    streams = range(1 if model.layer_variant == "dense" else 2)
    if model.has_sparse_experts:
        width = model.moe_ffn_hidden_size or model.ffn_hidden_size
        shared = 3 * h * (model.moe_shared_expert_intermediate_size or 0) / sizes.tp
        sparse = _Parts()
        for stream in streams:
            number = (model.und_num_experts, model.gen_num_experts)[stream]
            if number is None:
                dense.add(layers * mlp / sizes.tp, trains[stream])
            else:
                dense.add(layers * (h * number + shared), trains[stream])
                sparse.add(layers * 3 * h * width * number / sizes.ep, trains[stream])
        return [[dense.over(sizes.dp * sizes.cp), sparse.over(sizes.per_stage / sizes.ep)]]
    if sizes.ep == 1:
        for stream in streams:
            dense.add(layers * mlp / sizes.tp, trains[stream])
        return [[dense.over(sizes.dp * sizes.cp)]]
    und = und_ranks or sizes.ep // 2
    kinds = []
    for stream, holders in enumerate((und, sizes.ep - und)):
        part = _Parts()
        part.add(layers * mlp, trains[stream])
        kinds.append(part.over(sizes.per_stage * holders / sizes.ep))
    return [[dense.over(sizes.dp * sizes.cp), kind] for kind in kinds]


def _add_ends(dense: _Parts, model: ModelConfig, tp: int, ends: tuple[bool, bool]) -> None:
    """What is not a decoder layer. A frozen tower is on every rank."""
    h, channels = model.hidden_size, model.latent_patch_size**2 * model.vae.z_channels
    und_trains = not (model.freeze_llm or model.freeze_und)
    tower_trains = not (model.freeze_vit or model.freeze_und)
    tower, connector = vision_parameters(model.vit, h)
    if model.visual_und and (ends[0] or not tower_trains):
        dense.add(tower, tower_trains)
    if ends[0]:
        dense.add(model.vocab_size * h / tp, und_trains)
        if model.visual_und:
            dense.add(connector, not model.freeze_und)
        if model.visual_gen:
            dense.add(channels * h + h + _TIME_CHANNELS * h + h + h * h + h, True)
    if ends[1]:
        dense.add(h, und_trains)
        if model.layer_variant != "dense":
            dense.add(h, not model.freeze_llm)
        if not (model.tie_word_embeddings and ends[0]):
            dense.add(model.vocab_size * h / tp, not model.freeze_llm)
        if model.visual_gen:
            dense.add(h * channels + channels, True)


def rank_groups(model: ModelConfig, parallel: ParallelConfig, processes: int) -> list[list[list[Group]]]:
    """Per pipeline rank, per kind of rank: its parameter groups."""
    sizes = sizes_of(parallel, processes)
    per_stage = stage_layers(model, None, parallel)
    return [
        stage_groups(
            model, sizes, sum(per_stage[rank :: sizes.pp]), (rank == 0, rank == sizes.pp - 1), parallel.und_expert_ranks
        )
        for rank in range(sizes.pp)
    ]


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    parameters: float
    gradients: float
    optimizer: float
    average: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.average


def memory_of_ranks(model: ModelConfig, parallel: ParallelConfig, processes: int) -> list[list[Memory]]:
    """Per pipeline rank, per kind of rank (see `rank_groups`): bf16 training."""
    return [[_memory(groups) for groups in stage] for stage in rank_groups(model, parallel, processes)]


def _memory(groups: list[Group]) -> Memory:
    held, trained = sum(group.parameters for group in groups), sum(group.trained for group in groups)
    shard = sum(group.trained / group.ranks for group in groups)
    return Memory(BF16 * held, GRADIENT * trained, MAIN_AND_MOMENTS * shard, AVERAGE * shard)


def memory(model: ModelConfig, parallel: ParallelConfig, processes: int) -> Memory:
    """bf16 training; the largest value of each kind over all ranks."""
    ranks = [held for stage in memory_of_ranks(model, parallel, processes) for held in stage]
    return Memory(*(max(getattr(rank, f.name) for rank in ranks) for f in fields(Memory)))


def activation_bytes_per_row(model: ModelConfig, tp: int, sequence_parallel: bool, recompute: str | None) -> float:
    """bf16 bytes kept for the backward pass per layer and row of a context chunk, norms and attention being fused.

    Without recomputation: inputs and outputs of both norms (8 h bytes, split under sequence parallelism only); q, k, v
    as projected and in attention order, attention's result and the projection's input (8 h + 8 kv); the two halves of
    the gated MLP and their product (6 f). Selective (core_attn, mlp, layernorm): the layer's two inputs, q, k, v twice
    and the projection's input. Full: one input.
    """
    h, ffn = model.hidden_size, model.ffn_hidden_size
    kv = model.num_query_groups * (h // model.num_attention_heads)
    shards = tp if sequence_parallel else 1
    if recompute == "full":
        return 2 * h / shards
    if recompute == "selective":
        return 4 * h / shards + (6 * h + 8 * kv) / tp
    return 8 * h / shards + (8 * h + 8 * kv + 6 * ffn) / tp
