"""Which modules a decoder layer is made of, as data: the layer variants and the megatron-core spec."""

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megabagel.models.mot_layer import MoTLayer, MoTLayerSubmodules
from megabagel.models.stream import PARTS, StreamSubmodules

# Parts that the gen stream borrows from the und stream. BAGEL names: Qwen2MoTDecoderLayer, Qwen2MoEDecoderLayer
# (twin MLPs behind shared attention and norms), Qwen2DecoderLayer.
SHARED_PARTS: dict[str, frozenset[str]] = {
    "mot": frozenset(),
    "moe": frozenset(PARTS) - {"mlp"},
    "dense": frozenset(PARTS),
}


def layer_spec(variant: str, freeze_und: bool) -> ModuleSpec:
    """Spec of one decoder layer on megatron-core's own linears."""
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=MoTLayer,
        params={"freeze_und": freeze_und},
        submodules=MoTLayerSubmodules(stream=StreamSubmodules(mlp_submodules=mlp), shared=SHARED_PARTS[variant]),
    )


def block_spec(variant: str, freeze_und: bool, layers_on_stage: int) -> TransformerBlockSubmodules:
    """Spec of one pipeline stage's layers; final norms belong to the heads."""
    return TransformerBlockSubmodules(layer_specs=[layer_spec(variant, freeze_und)] * layers_on_stage, layer_norm=None)
