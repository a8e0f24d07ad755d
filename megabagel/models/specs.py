"""Which modules a decoder layer is made of, as data: the layer variants and the megatron-core spec."""

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megabagel.config.schema import ModelConfig, ParallelConfig
from megabagel.models.dense_mlp import DenseMLP
from megabagel.models.modality_experts import WholeMLP
from megabagel.models.mot_layer import MoTLayer, MoTLayerSubmodules
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


def _mlps(model: ModelConfig, parallel: ParallelConfig, expert_rank: int) -> tuple[ModuleSpec | None, ...]:
    """Specs of und's and gen's MLP on this expert-parallel rank."""
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if (und_ranks := und_expert_ranks(model, parallel)) is not None:
        whole = ModuleSpec(module=WholeMLP, submodules=linears)
        return (whole, None) if expert_rank < und_ranks else (None, whole)
    dense = ModuleSpec(module=DenseMLP, submodules=linears)
    experts = (model.und_num_experts, model.gen_num_experts)
    return tuple(dense if number is None else sparse_mlp_spec(number, model) for number in experts)


def layer_spec(model: ModelConfig, parallel: ParallelConfig, expert_rank: int) -> ModuleSpec:
    """Spec of one decoder layer on megatron-core's own linears, for one expert-parallel rank."""
    und, gen = (StreamSubmodules(mlp=mlp) for mlp in _mlps(model, parallel, expert_rank))
    return ModuleSpec(
        module=MoTLayer,
        params={"freeze_und": model.freeze_und, "und_expert_ranks": und_expert_ranks(model, parallel)},
        submodules=MoTLayerSubmodules(und=und, gen=gen, shared=SHARED_PARTS[model.layer_variant]),
    )


def block_spec(
    model: ModelConfig, parallel: ParallelConfig, expert_rank: int, layers: int
) -> TransformerBlockSubmodules:
    """Spec of the layers of one pipeline stage; final norms belong to the heads."""
    return TransformerBlockSubmodules(layer_specs=[layer_spec(model, parallel, expert_rank)] * layers, layer_norm=None)
