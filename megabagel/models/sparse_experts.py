"""Sparse experts inside a stream: megatron-core's `MoELayer` in place of the stream's MLP, fed with this rank's rows.

Experts that are the streams themselves are `modality_experts.py`'s matter; routing is `expert_router.py`'s.
"""

from dataclasses import replace

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megabagel.config.schema import ModelConfig
from megabagel.models.expert_mark import mark_as_expert
from megabagel.models.expert_router import PackRouter
from megabagel.models.linears import part_classes, spec
from megabagel.models.precision import Implementation


def sparse_submodules(implementation: Implementation) -> MoESubmodules:
    """What the layer is made of; Transformer Engine has one grouped product, else one expert runs after the other."""
    classes = {part: spec(path) for part, path in part_classes(implementation, "sparse").items()}
    experts, shared = classes["experts"], ModuleSpec(module=SharedExpertMLP)
    experts.submodules = MLPSubmodules(linear_fc1=classes["expert_column"], linear_fc2=classes["expert_row"])
    shared.submodules = MLPSubmodules(linear_fc1=classes["linear_fc1"], linear_fc2=classes["linear_fc2"])
    return MoESubmodules(experts=experts, shared_experts=shared, router=PackRouter)


def sparse_config(
    config: TransformerConfig, num_experts: int, model: ModelConfig, groups: ProcessGroupCollection
) -> TransformerConfig:
    """The decoder's configuration as the sparse layer sees it: whole experts, rows sharded over tensor parallelism."""
    return replace(
        config,
        num_moe_experts=num_experts,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size or config.ffn_hidden_size,
        moe_shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size,
        moe_router_topk=model.moe_router_topk,
        moe_router_load_balancing_type="none",  # megatron-core's losses are not exact here: the router brings its own
        moe_aux_loss_coeff=model.moe_aux_loss_coeff,
        moe_z_loss_coeff=model.moe_z_loss_coeff,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=config.transformer_impl == "transformer_engine",
        expert_model_parallel_size=groups.ep.size(),
        expert_tensor_parallel_size=1,
        sequence_parallel=groups.tp.size() > 1,
    )


def sparse_mlp_spec(num_experts: int, model: ModelConfig) -> ModuleSpec:
    """Spec of a stream's sparse MLP, built with `config` and `pg_collection` as any MLP of a layer is."""
    return ModuleSpec(module=SparseMLP, params={"num_experts": num_experts, "model": model})


class SparseMLP(MoELayer):
    """A stream's MLP of `num_experts` experts, `model.moe_router_topk` of which each row passes.

    Experts are spread over the expert-parallel ranks. An optional shared expert, which every row passes, is split over
    tensor-parallel ranks as a dense MLP is.
    """

    def __init__(
        self, config: TransformerConfig, num_experts: int, model: ModelConfig, pg_collection: ProcessGroupCollection
    ):
        super().__init__(
            sparse_config(config, num_experts, model, pg_collection),
            sparse_submodules(config.transformer_impl),
            pg_collection=pg_collection,
        )
        mark_as_expert(self.experts)
        # without sequence parallelism all tensor-parallel ranks hold the same rows: each routes its share only
        self.scatters = pg_collection.tp.size() > 1 and not config.sequence_parallel
        if self.scatters:
            self.router.sum_gradient_over_tensor_parallel_ranks()

    def forward(self, hidden: Tensor, padding: Tensor) -> tuple[Tensor, None]:
        """Rows of this rank [rows, 1, hidden] -> the same shape; the second value is the bias, as of any MLP.

        `padding`: bool [rows], True on rows that hold no token: they enter no auxiliary loss. All ranks of the
        expert-parallel group must call it.
        """
        if self.scatters:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
            padding = padding.chunk(self.tp_group.size())[self.tp_group.rank()]
        out, _ = super().forward(hidden, padding_mask=padding[None])
        if self.scatters:
            # what follows is the same on all these ranks: gradients are whole there, split them instead of summing
            out = gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False, group=self.tp_group)
        return out, None
