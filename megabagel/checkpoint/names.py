"""The tensor map: which released BAGEL tensors a parameter of our stage consists of, and how they are cut and merged.

One table serves both directions, import and export. It reads no files and knows no process groups.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megabagel.config.schema import ModelConfig

QKV, GATED = "qkv", "gated"

# (parameter, released names, dimension split over tensor-parallel ranks, how several released tensors merge)
_Row = tuple[str, tuple[str, ...], int | None, str | None]

_VIT = "vit_model.vision_model."
_OUTSIDE_LAYERS: tuple[_Row, ...] = (
    (r"embeddings\.und\.word_embeddings\.weight", ("language_model.model.embed_tokens.weight",), 0, None),
    (r"vision\.((?:patch|position)_embedding\.\w+)", (_VIT + r"embeddings.\1",), None, None),
    (r"vision\.(layers\..+)", (_VIT + r"encoder.\1",), None, None),
    (r"vision\.(post_layernorm\.\w+)", (_VIT + r"\1",), None, None),
    (r"embeddings\.und\.(connector\..+)", (r"\1",), None, None),
    (r"embeddings\.gen\.((?:vae2llm|time_embedder)\..+)", (r"\1",), None, None),
    (r"heads\.und_norm\.weight", ("language_model.model.norm.weight",), None, None),
    (r"heads\.gen_norm\.weight", ("language_model.model.norm_moe_gen.weight",), None, None),
    (r"heads\.lm_head\.weight", ("language_model.lm_head.weight",), 0, None),
    (r"heads\.(llm2vae\.\w+)", (r"\1",), None, None),
)
_NUMBER = r"(?P<expert>\d+)"  # of an expert among those of its rank
_SEQUENTIAL = r"mlp\.experts\.local_experts\." + _NUMBER + r"\."
_EXPERT_FC1 = ("mlp{t}.experts.{e}.gate_proj.weight", "mlp{t}.experts.{e}.up_proj.weight")
_EXPERT_FC2 = ("mlp{t}.experts.{e}.down_proj.weight",)
# Inside `decoder.layers.{i}.und.` or `.gen.`; `{t}` is the suffix of the gen twin. A part that the streams share exists
# under `und` only, so the layer variants need no rows of their own. A norm may be fused into the linear behind it.
_IN_STREAM: tuple[_Row, ...] = (
    (r"(?:input_layernorm\.|linear_qkv\.layer_norm_)weight", ("input_layernorm{t}.weight",), None, None),
    (r"linear_qkv\.(\w+)", tuple(rf"self_attn.{p}_proj{{t}}.\1" for p in "qkv"), 0, QKV),
    (r"q_layernorm\.weight", ("self_attn.q_norm{t}.weight",), None, None),
    (r"k_layernorm\.weight", ("self_attn.k_norm{t}.weight",), None, None),
    (r"linear_proj\.weight", ("self_attn.o_proj{t}.weight",), 1, None),
    (
        r"(?:pre_mlp_layernorm\.|mlp\.linear_fc1\.layer_norm_)weight",
        ("post_attention_layernorm{t}.weight",),
        None,
        None,
    ),
    (r"mlp\.linear_fc1\.weight", ("mlp{t}.gate_proj.weight", "mlp{t}.up_proj.weight"), 0, GATED),
    (r"mlp\.linear_fc2\.weight", ("mlp{t}.down_proj.weight",), 1, None),
    # sparse experts, by the names of Qwen's sparse models; `{e}` counts over all expert-parallel ranks
    (r"mlp\.router\.weight", ("mlp{t}.gate.weight",), None, None),
    (_SEQUENTIAL + r"linear_fc1\.weight", _EXPERT_FC1, None, GATED),
    (_SEQUENTIAL + r"linear_fc2\.weight", _EXPERT_FC2, None, None),
    (r"mlp\.experts\.linear_fc1\.weight" + _NUMBER, _EXPERT_FC1, None, GATED),
    (r"mlp\.experts\.linear_fc2\.weight" + _NUMBER, _EXPERT_FC2, None, None),
    (
        r"mlp\.shared_experts\.linear_fc1\.weight",
        ("mlp{t}.shared_expert.gate_proj.weight", "mlp{t}.shared_expert.up_proj.weight"),
        0,
        GATED,
    ),
    (r"mlp\.shared_experts\.linear_fc2\.weight", ("mlp{t}.shared_expert.down_proj.weight",), 1, None),
)
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(und|gen)\.(.+)")
GEN_SUFFIX = {"und": "", "gen": "_moe_gen"}
EMBEDDING, LM_HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


@dataclass(frozen=True)
class Rule:
    """Released tensors behind one parameter: `names` with their whole `shapes`, in the order in which they merge.

    A rank's parameter is `blocks` equal blocks of rows, each holding the next rows of every released tensor's shard in
    turn. One block: plain tensors, and the gated MLP (gate rows, then up rows). QKV: one block per query group of the
    rank (its q heads, then k, then v), megatron-core's order.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    tp_dim: int | None
    blocks: int


class Source(Protocol):
    """Where released tensors come from; reads only what is asked for."""

    def read(self, name: str, shape: tuple[int, ...], dim: int | None, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` along `dim` (None: all) of the tensor `name`, whose whole shape must be `shape`."""


def rule_for(
    parameter: str,
    local_shape: Iterable[int],
    layer_offset: int,
    tp_size: int,
    model: ModelConfig,
    whole_on_rank: bool = False,
    expert_parallel: tuple[int, int] = (0, 1),
) -> Rule:
    """The rule of a stage's parameter of `local_shape`; its first decoder layer is layer `layer_offset` of the model.

    `whole_on_rank`: not split over tensor-parallel ranks although the table says so (marked expert parameters).
    `expert_parallel`: this rank among how many that divide a stream's sparse experts.
    Raises KeyError when the table has no row for the parameter.
    """
    local_shape = tuple(local_shape)
    layer = _LAYER.fullmatch(parameter)
    prefix, twin, rows, name = "", "", _OUTSIDE_LAYERS, parameter
    if layer:
        prefix = f"language_model.model.layers.{int(layer[1]) + layer_offset}."
        twin, rows, name = GEN_SUFFIX[layer[2]], _IN_STREAM, layer[3]
    match, templates, tp_dim, merge = _row(rows, name, parameter)
    if "expert" in match.re.groupindex:
        rank, size = expert_parallel
        experts = model.und_num_experts if layer[2] == "und" else model.gen_num_experts
        first = rank * (experts // size) if size > 1 else 0
        templates = tuple(t.replace("{e}", str(first + int(match["expert"]))) for t in templates)
    names = tuple(prefix + match.expand(template).replace("{t}", twin) for template in templates)
    if model.tie_word_embeddings and names == (LM_HEAD,):
        names = (EMBEDDING,)
    if whole_on_rank:
        tp_dim = None
    whole = list(local_shape)
    if tp_dim is not None:
        whole[tp_dim] *= tp_size
    heads, groups = model.num_attention_heads, model.num_query_groups
    shares = {QKV: (heads, groups, groups), GATED: (1, 1), None: (1,)}[merge]
    shapes = tuple((whole[0] * share // sum(shares), *whole[1:]) for share in shares)
    return Rule(names, shapes, tp_dim, groups // tp_size if merge == QKV else 1)


def _row(rows: tuple[_Row, ...], name: str, parameter: str) -> tuple[re.Match, tuple[str, ...], int | None, str | None]:
    for pattern, *rest in rows:
        if match := re.fullmatch(pattern, name):
            return match, *rest
    raise KeyError(f"megabagel/checkpoint/names.py has no row for the parameter {parameter}")


def fill_shard(out: Tensor, source: Source, rule: Rule, tp_rank: int, tp_size: int) -> None:
    """Fill this tensor-parallel rank's parameter, contiguous, from the slices of the released tensors that it needs.

    Types are converted. One slice is in memory at a time, besides `out`.
    """
    blocks, begin = out.unflatten(0, (rule.blocks, -1)), 0
    for name, shape in zip(rule.names, rule.shapes, strict=True):
        size = 0 if rule.tp_dim is None else shape[rule.tp_dim] // tp_size
        part = source.read(name, shape, rule.tp_dim, tp_rank * size, (tp_rank + 1) * size)
        part = part.unflatten(0, (rule.blocks, -1))
        blocks[:, begin : begin + part.shape[1]] = part
        begin += part.shape[1]


def export_shard(tensor: Tensor, rule: Rule) -> dict[str, tuple[Tensor, int | None]]:
    """The inverse: released name -> (this rank's shard of it, dimension along which ranks' shards concatenate)."""
    if len(rule.names) == 1:
        return {rule.names[0]: (tensor, rule.tp_dim)}
    total = sum(shape[0] for shape in rule.shapes)
    blocks = tensor.unflatten(0, (rule.blocks, -1))
    parts = blocks.split([shape[0] * blocks.shape[1] // total for shape in rule.shapes], dim=1)
    return {name: (part.flatten(0, 1), rule.tp_dim) for name, part in zip(rule.names, parts, strict=True)}
