"""One stream's dense MLP: megatron-core's linears and sharded state, with the gated activation in one pass."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megabagel.ops.swiglu import swiglu


class GatedMLP(MLP):
    """silu(gate) * up between the linears, neither of which has a bias: what `build.py` configures every MLP to be."""

    def forward(self, hidden_states: Tensor, **_) -> tuple[Tensor, None]:
        """[rows, 1, hidden] -> the same shape; padding rows pass through it like any other."""
        gate_and_up, _ = self.linear_fc1(hidden_states)
        out, _ = self.linear_fc2(swiglu(gate_and_up))
        return out, None


class DenseMLP(GatedMLP):
    """Split by tensor parallelism, of width `config.ffn_hidden_size`."""

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, pg_collection: ProcessGroupCollection):
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=pg_collection.tp)
