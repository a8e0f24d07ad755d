"""Modality experts: the und and gen MLPs of a layer live on different expert-parallel ranks, and rows travel to them.

megatron-core's all-to-all dispatcher carries the rows; where they go follows from their stream alone. Experts chosen by
a learned router inside one stream are `sparse_experts.py`'s matter.
"""

import copy
from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import pad

from megabagel.models.dense_mlp import GatedMLP


def expert_config(config: TransformerConfig, ranks: int) -> TransformerConfig:
    """The layer's configuration as its MLPs see it: one on each of `ranks` ranks, whole, and each row passes one."""
    changed = copy.copy(config)
    changed.num_moe_experts = changed.expert_model_parallel_size = ranks
    changed.expert_tensor_parallel_size = changed.moe_router_topk = 1
    changed.moe_token_dispatcher_type = "alltoall"
    return changed


class WholeMLP(GatedMLP):
    """One stream's MLP, not split by tensor parallelism, on the expert-parallel ranks that hold this stream."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection,
    ):
        super().__init__(
            expert_config(config, pg_collection.ep.size()),
            submodules,
            is_expert=True,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=pg_collection.expt_tp,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As the dense MLP's, so that other layouts load it; replicas are the ranks that hold this stream."""
        holders = {"dp_cp_group": parallel_state.get_expert_data_parallel_group()}
        return super().sharded_state_dict(prefix, sharded_offsets, {**(metadata or {}), **holders})


class ModalityExchange:
    """Sends rows of both streams to ranks that hold their MLP and brings the results back.

    The first `und_ranks` expert-parallel ranks hold und's MLPs, the others gen's. Rows go to the holders in turn.
    """

    def __init__(self, config: TransformerConfig, und_ranks: int, groups: ProcessGroupCollection):
        self.tp_group = groups.tp
        # without sequence parallelism all tensor-parallel ranks hold the same rows: each sends its share only
        self.scatters = groups.tp.size() > 1 and not config.sequence_parallel
        self.ranks, self.und_ranks = groups.ep.size(), und_ranks
        self.holds_und = groups.ep.rank() < und_ranks
        # how many rows a rank gets is no multiple of anything
        self.row_alignment = get_fp8_align_size(config.fp8_recipe) if config.fp8 else 1
        self.dispatcher = MoEAlltoAllTokenDispatcher(1, [groups.ep.rank()], expert_config(config, self.ranks), groups)

    def __call__(self, und: Tensor, gen: Tensor, mlp: Callable[[Tensor], tuple]) -> tuple[Tensor, Tensor]:
        """Normalised und and gen rows of this rank, each [rows, 1, hidden] -> the MLPs' results, same shapes.

        `mlp` is the one that this rank holds. All ranks of the expert-parallel group must call it.
        """
        streams = [und, gen]
        if self.scatters:
            streams = [scatter_to_sequence_parallel_region(s, group=self.tp_group) for s in streams]
        holders = self._holders(*(len(s) for s in streams), und.device)
        sent = holders[:, None] == torch.arange(self.ranks, device=und.device)  # [rows, ranks], one True in each row
        dispatcher = self.dispatcher
        rows, probs = dispatcher.dispatch_preprocess(torch.cat(streams), sent, sent.float())
        rows, probs = dispatcher.token_dispatch(rows, probs)
        rows, _, _ = dispatcher.dispatch_postprocess(rows, probs)
        missing = -len(rows) % self.row_alignment
        out, _ = mlp(pad(rows, (0, 0, 0, missing)) if missing else rows)
        out = dispatcher.token_combine(dispatcher.combine_preprocess(out[: len(rows)]))
        results = dispatcher.combine_postprocess(out).split([len(s) for s in streams])
        if self.scatters:
            # what follows is the same on all these ranks: gradients are whole there, split them instead of summing
            results = [
                gather_from_sequence_parallel_region(r, tensor_parallel_output_grad=False, group=self.tp_group)
                for r in results
            ]
        return tuple(results)

    def _holders(self, und: int, gen: int, device: torch.device) -> Tensor:
        """Expert-parallel rank that each row goes to, int64 [und + gen]."""
        gen_ranks = self.ranks - self.und_ranks
        of_und = torch.arange(und, device=device) % self.und_ranks
        return torch.cat([of_und, self.und_ranks + torch.arange(gen, device=device) % gen_ranks])
