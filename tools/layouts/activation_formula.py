"""Bytes that a rank holds beyond its state while it runs forward and backward, from the shapes alone.

Kept activations, what is computed again, the largest temporaries and the heads. Pure arithmetic, compared with the
allocator's count by measure_layouts.py. Left out: copies that gloo makes of what it reduces.
"""

from dataclasses import dataclass

from layouts.memory_formula import BF16, Sizes, activation_bytes_per_row, sizes_of
from layouts.traffic_formula import Load, copied_heads
from megabagel.config.pipeline_split import stage_layers
from megabagel.config.schema import Config

FLOAT32 = 4
_TIME_CHANNELS = 256
_HEAD_ROWS_AT_ONCE = 16384  # of the vocabulary head's weight gradient, see models/vocabulary_head.py


@dataclass(frozen=True)
class Held:
    """Bytes of one rank at the fullest moment of forward and backward. `total` is what the allocator should count."""

    layers: float  # kept by decoder layers, of all micro-batches that wait for their backward pass
    ends: float  # kept by ViT, connector and embeddings of the first stage, of the same micro-batches
    logits: float  # the heads' gradients and temporaries, while the layers' activations are complete
    workspace: float  # one layer computed again, gradients on their way; never at the same time as `logits`

    @property
    def total(self) -> float:
        return self.layers + self.ends + max(self.logits, self.workspace)


def waiting_chunks(sizes: Sizes, rank: int, packs: int) -> float:
    """Micro-batches of all of a rank's layers that it keeps at most (megatron-core's 1F1B, plain and interleaved).

    Interleaved, a rank starts 2 (pp - rank - 1) + (vp - 1) pp chunks before its first backward pass.
    """
    if sizes.pp == 1:
        return 1
    if sizes.vp == 1:
        return min(packs, sizes.pp - rank)
    chunks = 2 * (sizes.pp - rank - 1) + (sizes.vp - 1) * sizes.pp + 1
    return min(packs * sizes.vp, chunks) / sizes.vp if packs > sizes.pp else packs


def held(config: Config, processes: int, load: Load) -> list[list[Held]]:
    """Per pipeline rank, per kind of rank (holders of und's and of gen's MLPs). bf16, nothing frozen."""
    sizes = sizes_of(config.parallel, processes)
    per_stage = stage_layers(config.model, None, config.parallel)
    kinds = 2 if sizes.ep > 1 and not config.model.has_sparse_experts else 1
    packs = load.packs // sizes.dp
    return [
        [_held(config, sizes, load, rank, sum(per_stage[rank :: sizes.pp]), packs, kind) for kind in range(kinds)]
        for rank in range(sizes.pp)
    ]


def _held(config: Config, sizes: Sizes, load: Load, rank: int, layers: int, packs: int, kind: int) -> Held:
    recompute = config.training.recompute_granularity
    waiting = waiting_chunks(sizes, rank, packs)
    one = layer_bytes(config, sizes, load, kind, recompute)
    kept = layers * waiting * one
    ends = logits = 0.0
    if rank == 0:
        # one micro-batch of a pipeline with interleaving waits for its first chunk only
        ends = waiting * first_stage_bytes(config, sizes, load)
    if rank == sizes.pp - 1:
        logits = last_stage_bytes(config, sizes, load)
    elif sizes.pp > 1:
        # what was sent to the next stage stays until its gradient comes, where a group cannot drop it (gloo)
        ends += waiting * sizes.vp * _rows(config, sizes, load) * BF16 * config.model.hidden_size
    return Held(kept, ends, logits, again_bytes(config, sizes, load, kind) + gradient_bytes(config, sizes, load, kind))


def _shards(config: Config, sizes: Sizes) -> int:
    return sizes.tp if config.parallel.sequence_parallel else 1


def _rows(config: Config, sizes: Sizes, load: Load) -> float:
    """Rows between the matrices on a rank."""
    return load.rows / sizes.cp / _shards(config, sizes)


def mlp_rows(config: Config, sizes: Sizes, load: Load, kind: int) -> tuple[float, float]:
    """Rows of each stream's MLP on a rank, times the share of its width that the rank holds.

    Modality experts: those of one stream, of all ranks of the group. Sparse: top-k copies, spread evenly.
    """
    own = [rows / sizes.cp / sizes.tp for rows in (load.und_rows, load.gen_rows)]
    model = config.model
    if model.has_sparse_experts:
        width = (model.moe_ffn_hidden_size or model.ffn_hidden_size) / model.ffn_hidden_size
        experts = (model.und_num_experts, model.gen_num_experts)
        return tuple(r * (1 if n is None else width * model.moe_router_topk) for r, n in zip(own, experts, strict=True))
    if sizes.ep == 1:
        return tuple(own)
    und = config.parallel.und_expert_ranks or sizes.ep // 2
    return (own[0] * sizes.ep / und, 0.0) if kind == 0 else (0.0, own[1] * sizes.ep / (sizes.ep - und))


def layer_bytes(config: Config, sizes: Sizes, load: Load, kind: int, recompute: str | None) -> float:
    """Kept by one layer for one micro-batch."""
    model, tp = config.model, sizes.tp
    rows = load.rows / sizes.cp
    total = rows * activation_bytes_per_row(model, tp, config.parallel.sequence_parallel, recompute)
    if recompute == "full":
        return total
    heads, kv_heads = model.num_attention_heads // tp, model.num_query_groups // tp
    head = model.hidden_size // model.num_attention_heads
    copies = copied_heads(heads, kv_heads, sizes.cp) / kv_heads - 1
    total += rows * copies * 2 * kv_heads * head * BF16  # keys and values in attention order
    if recompute is None:
        own = rows / tp
        total += (sum(mlp_rows(config, sizes, load, kind)) - own) * 3 * BF16 * model.ffn_hidden_size
        total += rows * FLOAT32 * (heads + 2 / _shards(config, sizes))  # logarithms of sums; the norms' roots
    if model.has_sparse_experts or sizes.ep > 1:
        total += _travelling(config, sizes, load, kind, recompute)
    return total


def _travelling(config: Config, sizes: Sizes, load: Load, kind: int, recompute: str | None) -> float:
    """Inputs and outputs of experts in the order in which they arrived, beside those in the streams' order."""
    if recompute is not None:
        return 0.0
    copies = 2 if config.model.has_sparse_experts else 1
    return copies * sum(mlp_rows(config, sizes, load, kind)) * sizes.tp * BF16 * config.model.hidden_size / sizes.tp


def again_bytes(config: Config, sizes: Sizes, load: Load, kind: int) -> float:
    """What is computed again of one layer, all of it there at once."""
    recompute = config.training.recompute_granularity
    if recompute is None:
        return 0.0
    if recompute == "full":
        return layer_bytes(config, sizes, load, kind, None)
    mlp = sum(mlp_rows(config, sizes, load, kind)) * 3 * BF16 * config.model.ffn_hidden_size
    return mlp + _rows(config, sizes, load) * 2 * BF16 * config.model.hidden_size


def gradient_bytes(config: Config, sizes: Sizes, load: Load, kind: int) -> float:
    """Gradients on their way through the gated MLP of one stream: of the product, of both halves; one weight's."""
    model = config.model
    rows = max(mlp_rows(config, sizes, load, kind))
    residual = 2 * _rows(config, sizes, load) * BF16 * model.hidden_size
    whole = sizes.ep > 1 or model.has_sparse_experts
    weight = 2 * model.ffn_hidden_size * model.hidden_size * BF16 / (1 if whole else sizes.tp)
    return residual + max(2 * rows * BF16 * model.ffn_hidden_size, rows * BF16 * model.ffn_hidden_size + weight)


def first_stage_bytes(config: Config, sizes: Sizes, load: Load) -> float:
    """Kept by ViT, connector and embeddings for one micro-batch: pictures spread over tensor and context ranks."""
    model = config.model
    total = 0.0
    if model.visual_und:
        vit, share = model.vit, load.vit_tokens / (sizes.tp * sizes.cp)
        layer = 16 * vit.hidden_size + 4 * vit.ffn_hidden_size + FLOAT32 * vit.num_attention_heads
        tower = 3 * vit.patch_size**2 * BF16 + vit.num_layers * layer + 2 * vit.hidden_size * BF16
        total += share * tower if not (model.freeze_vit or model.freeze_und) else 0
        # features of the chunk, the connector's two inner results, the rows to place in the stream
        total += load.vit_tokens / sizes.cp * BF16 * (vit.hidden_size + 3 * model.hidden_size)
    if model.visual_gen:
        channels = model.latent_patch_size**2 * model.vae.z_channels
        total += load.gen_rows / sizes.cp * BF16 * (channels + _TIME_CHANNELS + 2 * model.hidden_size)
    return total


def last_stage_bytes(config: Config, sizes: Sizes, load: Load) -> float:
    """The heads' share at the start of the backward pass: gradients that the vocabulary head made in its forward pass,
    their copy in the weight's dtype, and a piece of that in float32 twice."""
    model = config.model
    h, classes = model.hidden_size, model.vocab_size / sizes.tp
    ce = load.ce_rows / sizes.cp
    many = ce > config.kernels.cross_entropy_chunk_rows
    logits = min(ce, config.kernels.cross_entropy_chunk_rows) * classes * BF16
    weight = classes * h * (FLOAT32 if many else BF16)
    scaled = classes * h * BF16 + 2 * FLOAT32 * h * min(classes, _HEAD_ROWS_AT_ONCE)
    norms = 2 * _rows(config, sizes, load) * BF16 * h
    channels = model.latent_patch_size**2 * model.vae.z_channels
    latent = load.mse_rows / sizes.cp * (BF16 * h + 2 * FLOAT32 * channels)
    return norms + latent + ce * BF16 * h + weight + max(logits, scaled)
