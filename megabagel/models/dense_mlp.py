"""One stream's dense MLP, split by tensor parallelism: megatron-core's, built as a layer builds any of its MLPs."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig


class DenseMLP(MLP):
    """Gated MLP of width `config.ffn_hidden_size`; padding rows pass through it like any other."""

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, pg_collection: ProcessGroupCollection):
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=pg_collection.tp)
