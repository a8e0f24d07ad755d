"""Bytes that a rank sends in a step, from the shapes alone, by the convention of traffic.py.

The terms that grow with the model or with the tokens; left out are scalars, counts, the vocabulary head's sums and the
vision tower's exchange.
"""

from collections import Counter
from dataclasses import dataclass
from math import gcd

from layouts.memory_formula import BF16, GRADIENT, Sizes, rank_groups, sizes_of
from megabagel.config.pipeline_split import stage_layers
from megabagel.config.schema import Config


@dataclass(frozen=True)
class Load:
    """What is trained on in a step: padded rows of each stream of a pack and packs of all replicas; of a pack, ViT
    tokens and the rows that each head reads."""

    und_rows: int
    gen_rows: int
    packs: int
    vit_tokens: int = 0
    ce_rows: int = 0
    mse_rows: int = 0

    @property
    def rows(self) -> int:
        return self.und_rows + self.gen_rows


def traffic(config: Config, processes: int, load: Load) -> dict[str, float]:
    """Kind of collective -> bytes that the rank with most of it sends in one step."""
    sizes = sizes_of(config.parallel, processes)
    per_stage = stage_layers(config.model, None, config.parallel)
    worst: Counter[str] = Counter()
    for rank, kinds in enumerate(rank_groups(config.model, config.parallel, processes)):
        layers = sum(per_stage[rank :: sizes.pp])
        for holder, groups in enumerate(kinds):
            sent: Counter[str] = Counter()
            for group in groups:
                share = (group.ranks - 1) / group.ranks
                sent["reduce-scatter"] += GRADIENT * group.trained * share
                sent["all-gather"] += BF16 * group.trained * share
            for part in (
                _tensor(config, sizes, rank, layers, load),
                _context(config, sizes, layers, load),
                _pipeline(config, sizes, rank, load),
                _modality(config, sizes, layers, holder, load),
                _sparse(config, sizes, layers, load),
            ):
                for kind, size in part.items():
                    sent[kind] += size * load.packs / sizes.dp
            for kind, size in sent.items():
                worst[kind] = max(worst[kind], size)
    return {kind: size for kind, size in worst.items() if size}


def _forwards(config: Config) -> tuple[int, int]:
    """How often a layer's attention half and its MLP half communicate forward in a step."""
    training = config.training
    if training.recompute_granularity == "full":
        return 2, 2
    return 1, 2 if training.recompute_granularity == "selective" and "mlp" in training.recompute_modules else 1


def _mlp_is_split(config: Config, sizes: Sizes) -> bool:
    """Whether tensor parallelism splits the MLPs; experts are whole on a rank."""
    return sizes.ep == 1 and config.model.und_num_experts is None


def _tensor(config: Config, sizes: Sizes, rank: int, layers: int, load: Load) -> dict[str, float]:
    """Per pack. Each of a layer's two halves (attention, MLP) enters and leaves the split region once, forward and
    backward. Under sequence parallelism the backward pass gathers the inputs once more for the weights' gradients."""
    if sizes.tp == 1:
        return {}
    unit = (sizes.tp - 1) / sizes.tp * load.rows / sizes.cp * config.model.hidden_size * BF16
    forwards = _forwards(config) if _mlp_is_split(config, sizes) else _forwards(config)[:1]
    ends = (rank == 0) + (rank == sizes.pp - 1)
    if config.parallel.sequence_parallel:
        return {
            "all-gather": unit * (layers * sum(n + 2 for n in forwards) + ends),
            "reduce-scatter": unit * layers * sum(n + 1 for n in forwards),
        }
    return {"all-reduce": 2 * unit * layers * sum(n + 1 for n in forwards)}


def copied_heads(heads: int, kv_heads: int, ranks: int) -> int:
    """Key heads that travel when `heads` query heads are spread over `ranks` ranks."""
    return heads // gcd(heads // ranks, heads // kv_heads)


def _context(config: Config, sizes: Sizes, layers: int, load: Load) -> dict[str, float]:
    """Per pack: q, keys and values to the ranks of their heads, the result back; all of it again backward."""
    if sizes.cp == 1:
        return {}
    model = config.model
    heads, kv_heads = model.num_attention_heads // sizes.tp, model.num_query_groups // sizes.tp
    values = 2 * heads + 2 * copied_heads(heads, kv_heads, sizes.cp)
    head = model.hidden_size // model.num_attention_heads
    share = (sizes.cp - 1) / sizes.cp * load.rows / sizes.cp
    return {"all-to-all": share * values * head * BF16 * layers * (_forwards(config)[0] + 1)}


def _pipeline(config: Config, sizes: Sizes, rank: int, load: Load) -> dict[str, float]:
    """Per pack: the rows of every chunk but the last one forward, of every chunk but the first one backward."""
    if sizes.pp == 1:
        return {}
    rows = load.rows / sizes.cp / (sizes.tp if config.parallel.sequence_parallel else 1)
    sends = 2 * sizes.vp - (rank == 0) - (rank == sizes.pp - 1)
    return {"p2p": sends * rows * config.model.hidden_size * BF16}


def _modality(config: Config, sizes: Sizes, layers: int, holder: int, load: Load) -> dict[str, float]:
    """Per pack: rows to the ranks that hold their stream's MLP and back, both ways again backward."""
    if sizes.ep == 1 or config.model.has_sparse_experts:
        return {}
    und_ranks = config.parallel.und_expert_ranks or sizes.ep // 2
    holders = (und_ranks, sizes.ep - und_ranks)
    own = [rows / sizes.cp / sizes.tp for rows in (load.und_rows, load.gen_rows)]
    leaving = own[holder] * (1 - 1 / holders[holder]) + own[1 - holder]
    returning = (sizes.ep - 1) * own[holder] / holders[holder]
    passes = _forwards(config)[1] + 1
    row = config.model.hidden_size * BF16
    both = _scatter(config, sizes, layers, load)
    return {"all-to-all": passes * layers * (leaving + returning) * row, **both}


def _sparse(config: Config, sizes: Sizes, layers: int, load: Load) -> dict[str, float]:
    """Per pack, if the router spreads the rows evenly: top-k copies of each row to its experts and back."""
    experts = (config.model.und_num_experts, config.model.gen_num_experts)
    if experts == (None, None):
        return {}
    rows = sum(n for n, e in zip((load.und_rows, load.gen_rows), experts, strict=True) if e is not None)
    rows *= config.model.moe_router_topk / sizes.cp / sizes.tp
    share = (sizes.ep - 1) / sizes.ep
    passes = _forwards(config)[1] + 1
    sent = passes * layers * 2 * rows * share * config.model.hidden_size * BF16
    return {"all-to-all": sent, **_scatter(config, sizes, layers, load)}


def _scatter(config: Config, sizes: Sizes, layers: int, load: Load) -> dict[str, float]:
    """Without sequence parallelism rows are scattered to the tensor-parallel ranks and gathered behind the experts."""
    if sizes.tp == 1 or config.parallel.sequence_parallel:
        return {}
    unit = (sizes.tp - 1) / sizes.tp * load.rows / sizes.cp * config.model.hidden_size * BF16
    return {"all-gather": unit * layers * (_forwards(config)[1] + 1)}
