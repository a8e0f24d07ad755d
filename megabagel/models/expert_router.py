"""The router of sparse experts, with auxiliary losses that are exact per pack and the same in every layout.

It says which rows go to which experts; what carries them there is megatron-core's `MoELayer`, set up in
`sparse_experts.py`.
"""

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class _Float32Linear(torch.autograd.Function):
    """x @ weight.T in float32, which keeps x in its own type for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.float() @ weight.float().T

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return (gradient @ weight.float()).to(x.dtype), (gradient.T @ x.float()).to(weight.dtype)


class PackRouter(TopKRouter):
    """Softmax over the logits of the chosen experts: their weights sum to 1. Logits and losses are float32.

    Two losses over the T valid rows of a pack, those of all tensor- and context-parallel ranks; E experts, k per row:
    load balancing E * sum_e (rows that chose e / (k T)) * (mean softmax probability of e), 1 when all are used alike
    (Switch Transformer, arXiv 2101.03961, equation 4), and z = mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906,
    equation 5). Their gradients, times coefficient and `MoEAuxLossAutoScaler`'s scale, join those of the model's loss.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection):
        super().__init__(config, pg_collection)
        self.sums_gradient_over_tp = False
        self._measured: Tensor | None = None

    def sum_gradient_over_tensor_parallel_ranks(self) -> None:
        """For models without sequence parallelism: there megatron-core takes replicated gradients for whole."""
        self.sums_gradient_over_tp = True
        self.weight.sequence_parallel = False

    def gating(self, input: Tensor) -> Tensor:
        """Rows [s, 1, hidden] -> logits [s, experts], float32."""
        weight = self.weight
        if self.sums_gradient_over_tp:
            weight = copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
        return _Float32Linear.apply(input[:, 0], weight)

    def routing(self, logits: Tensor, padding_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [s, experts], mask [s, 1] True on padding -> weights and choices [s, experts]."""
        weights, chosen = topk_routing_with_score_function(logits, self.topk)
        if self.training and torch.is_grad_enabled():  # not in the first pass of recomputation
            weights = self._with_losses(weights, chosen, logits, ~padding_mask)
        return weights, chosen

    def _with_losses(self, weights: Tensor, chosen: Tensor, logits: Tensor, valid: Tensor) -> Tensor:
        """`weights`, whose backward pass also starts that of this rank's share of the losses."""
        counts = torch.cat([chosen & valid, valid], dim=1).sum(dim=0)  # rows that chose each expert, all rows
        dist.all_reduce(counts, group=self.tp_cp_group)
        rows = counts[-1].clamp(min=1)  # a pack may hold no token of this stream
        scores = (torch.softmax(logits, dim=-1) * valid).sum(dim=0) / rows
        balance = self.num_experts / self.topk * (scores * counts[:-1] / rows).sum()
        z = (torch.logsumexp(logits, dim=-1, keepdim=True).square() * valid).sum() / rows
        if self._measured is None:
            self._measured = logits.new_zeros(2)
        self._measured += torch.stack([balance, z]).detach()
        loss = self.config.moe_aux_loss_coeff * balance + self.config.moe_z_loss_coeff * z
        return MoEAuxLossAutoScaler.apply(weights, loss)

    def take_measured(self) -> Tensor | None:
        """This rank's shares of (load balancing, z), without coefficients, summed over the packs since the last call.

        float32 [2]; None when no pack has passed.
        """
        measured, self._measured = self._measured, None
        return measured
