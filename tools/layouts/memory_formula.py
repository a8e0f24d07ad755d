"""Bytes per rank from the shapes alone: weights, gradients, optimizer state, moving average and kept activations.

Pure arithmetic on the configuration, written down independently of the model's code, which it is compared with.
"""

from dataclasses import dataclass

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
    """Parameters of a rank that are reduced over, and whose optimizer state is sharded over, `ranks` ranks."""

    parameters: float
    ranks: float


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


def stage_groups(model: ModelConfig, sizes: Sizes, layers: int, ends: tuple[bool, bool], und_ranks: int | None):
    """Parameter groups of a rank with `layers` layers, one list per kind of rank (holders of und's and of gen's MLPs).

    `ends`: whether the stage is the first and the last one.
    """
    h, tp = model.hidden_size, sizes.tp
    streams = {"mot": 2, "moe": 1, "dense": 1}[model.layer_variant]
    mlps = 1 if model.layer_variant == "dense" else 2
    dense = layers * streams * attention_parameters(model, tp)
    channels = model.latent_patch_size**2 * model.vae.z_channels
    if ends[0]:
        dense += model.vocab_size * h / tp
        if model.visual_und:
            dense += sum(vision_parameters(model.vit, h))
        if model.visual_gen:
            dense += channels * h + h + _TIME_CHANNELS * h + h + h * h + h
    if ends[1]:
        dense += h if model.layer_variant == "dense" else 2 * h
        if not (model.tie_word_embeddings and ends[0]):
            dense += model.vocab_size * h / tp
        if model.visual_gen:
            dense += h * channels + channels
    mlp = 3 * h * model.ffn_hidden_size
    experts = [n for n in (model.und_num_experts, model.gen_num_experts) if n is not None]
    if experts:
        width = model.moe_ffn_hidden_size or model.ffn_hidden_size
        shared = 3 * h * (model.moe_shared_expert_intermediate_size or 0) / tp
        dense += layers * ((mlps - len(experts)) * mlp / tp + sum(h * n + shared for n in experts))
        sparse = Group(layers * sum(3 * h * width * n / sizes.ep for n in experts), sizes.per_stage / sizes.ep)
        return [[Group(dense, sizes.dp * sizes.cp), sparse]]
    if sizes.ep == 1:
        return [[Group(dense + layers * mlps * mlp / tp, sizes.dp * sizes.cp)]]
    und = und_ranks or sizes.ep // 2
    kinds = [
        Group(layers * mlp, sizes.per_stage * und / sizes.ep),
        Group(layers * mlp, sizes.per_stage * (sizes.ep - und) / sizes.ep),
    ]
    return [[Group(dense, sizes.dp * sizes.cp), kind] for kind in kinds]


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


def memory(model: ModelConfig, parallel: ParallelConfig, processes: int) -> Memory:
    """bf16 training with nothing frozen; the largest value of each kind over all ranks."""
    ranks = [groups for stage in rank_groups(model, parallel, processes) for groups in stage]
    held = [sum(group.parameters for group in groups) for groups in ranks]
    shards = [sum(group.parameters / group.ranks for group in groups) for groups in ranks]
    return Memory(BF16 * max(held), GRADIENT * max(held), MAIN_AND_MOMENTS * max(shards), AVERAGE * max(shards))


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
