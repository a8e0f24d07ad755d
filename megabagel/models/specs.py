"""Which modules a decoder layer is made of, as data: the layer variants and the megatron-core spec."""

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megabagel.config.schema import ModelConfig, ParallelConfig
from megabagel.models.dense_mlp import DenseMLP
from megabagel.models.linears import part_classes, spec
from megabagel.models.modality_experts import WholeMLP
from megabagel.models.mot_layer import MoTLayer, MoTLayerSubmodules
from megabagel.models.recompute import Recompute
from megabagel.models.sparse_experts import sparse_mlp_spec
from megabagel.models.stream import PARTS, StreamSubmodules

# Parts that the gen stream borrows from the und stream. BAGEL names: Qwen2MoTDecoderLayer, Qwen2MoEDecoderLayer
# (twin MLPs behind shared attention and norms), Qwen2DecoderLayer.
SHARED_PARTS: dict[str, frozenset[str]] = {
    "mot": frozenset(),
    "moe": frozenset(PARTS) - {"mlp"},
    "dense": frozenset(PARTS),
}


def und_expert_ranks(model: ModelConfig, parallel: ParallelConfig) -> int | None:
    """How many of the expert-parallel ranks hold und's MLPs; None without modality experts: no stream's are apart."""
    if parallel.expert_model_parallel_size == 1 or model.has_sparse_experts:
        return None
    return parallel.und_expert_ranks or parallel.expert_model_parallel_size // 2


def _stream(
    config: TransformerConfig, model: ModelConfig, num_experts: int | None, whole: bool, holds_mlp: bool
) -> StreamSubmodules:
    """A stream with sparse experts, with its MLP on some ranks only (`whole`), or with a dense one."""
    kind = "whole" if whole else "dense" if num_experts is None else "sparse"
    shared = SHARED_PARTS[model.layer_variant]
    classes = part_classes(config.transformer_impl, kind, shared, "layernorm" in Recompute(config).modules)
    linears = MLPSubmodules(linear_fc1=spec(classes["linear_fc1"]), linear_fc2=spec(classes["linear_fc2"]))
    mlps = {
        "whole": ModuleSpec(module=WholeMLP, submodules=linears),
        "dense": ModuleSpec(module=DenseMLP, submodules=linears),
        "sparse": sparse_mlp_spec(num_experts, model),
    }
    attention = {name: spec(classes[name]) for name in ("input_layernorm", "linear_qkv", "linear_proj")}
    norm = spec(classes["pre_mlp_layernorm"])
    return StreamSubmodules(**attention, pre_mlp_layernorm=norm, mlp=mlps[kind] if holds_mlp else None)


def layer_spec(config: TransformerConfig, model: ModelConfig, parallel: ParallelConfig, expert_rank: int) -> ModuleSpec:
    """Spec of one decoder layer on the linears of `config.transformer_impl`, for one expert-parallel rank."""
    und_ranks = und_expert_ranks(model, parallel)
    whole = und_ranks is not None
    return ModuleSpec(
        module=MoTLayer,
        params={"freeze_und": model.freeze_und, "und_expert_ranks": und_ranks},
        submodules=MoTLayerSubmodules(
            und=_stream(config, model, model.und_num_experts, whole, not whole or expert_rank < und_ranks),
            gen=_stream(config, model, model.gen_num_experts, whole, not whole or expert_rank >= und_ranks),
            shared=SHARED_PARTS[model.layer_variant],
        ),
    )


def block_spec(
    config: TransformerConfig, model: ModelConfig, parallel: ParallelConfig, expert_rank: int, layers: int
) -> TransformerBlockSubmodules:
    """Spec of the layers of one pipeline stage; final norms belong to the heads."""
    layer = layer_spec(config, model, parallel, expert_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=None)
