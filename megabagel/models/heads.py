"""The last pipeline stage's part: final norms, vocabulary head and latent head, on rows that carry a loss only.

A rank computes the losses of its own chunk's rows. Each head also reads a row that counts nothing, so that every weight
is in the graph of every step.
"""

from typing import NamedTuple

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import pad

from megabagel.config.schema import ModelConfig
from megabagel.models.flow import FlowTokens
from megabagel.models.norm import RMSNorm
from megabagel.models.routing import Routing


class RowLosses(NamedTuple):
    """Unreduced losses of a chunk; the last row of each counts nothing and must get weight zero."""

    ce: Tensor  # [Nc + 1] float32, nats
    ce_weights: Tensor  # [Nc] float32, of `ce_loss_reweighting`
    mse: Tensor  # [Nm + 1] float32, mean over latent channels


class OutputHeads(MegatronModule):
    """Final hidden rows -> per-row losses. `shared_norm`: gen uses und's final norm (dense variant)."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        tp_group: torch.distributed.ProcessGroup,
        shared_norm: bool,
        own_lm_head: bool,
    ):
        super().__init__(config)
        self.tp_group, self.freeze_und = tp_group, model.freeze_und
        dtype = config.params_dtype
        self.und_norm = RMSNorm(model.hidden_size, model.layernorm_epsilon, dtype)
        self.gen_norm = None if shared_norm else RMSNorm(model.hidden_size, model.layernorm_epsilon, dtype)
        self.lm_head = ColumnParallelLinear(
            model.hidden_size,
            model.vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=not own_lm_head,
            tp_group=tp_group,
        )
        # its input is the gathered loss rows, the same on every tensor-parallel rank
        self.lm_head.sequence_parallel = False
        self.lm_head.allreduce_dgrad = tp_group.size() > 1
        if model.visual_gen:
            self.llm2vae = nn.Linear(model.hidden_size, model.latent_patch_size**2 * model.vae.z_channels, dtype=dtype)

    def final_hidden(self, hidden: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Normalised und and gen rows of the chunk, each [rows, hidden], on every tensor-parallel rank."""
        lengths = routing.stream_lengths
        scale = sum(lengths) // hidden.shape[0]
        und, gen = hidden[:, 0].split([length // scale for length in lengths])
        if self.config.sequence_parallel:
            # the heads compute the same rows on every rank: their gradient is whole, split it instead of summing
            und, gen = (
                gather_from_sequence_parallel_region(s, tensor_parallel_output_grad=False, group=self.tp_group)
                for s in (und, gen)
            )
        und = self.und_norm(und)
        if self.freeze_und:
            und = und.detach()
        return und, (self.gen_norm or self.und_norm)(gen)

    def forward(
        self, hidden: Tensor, routing: Routing, flow: FlowTokens | None, lm_head_weight: Tensor | None
    ) -> RowLosses:
        """hidden [rows, 1, hidden] -> losses. `lm_head_weight`: the tied embedding, else None."""
        chunk = routing.chunk
        und, gen = self.final_hidden(hidden, routing)
        rows = und[pad(chunk.ce_rows, (0, 1))]
        logits, _ = self.lm_head(rows[:, None], weight=lm_head_weight)  # [Nc + 1, 1, vocab / tp]
        ce = vocab_parallel_cross_entropy(logits.float(), pad(chunk.ce_labels, (0, 1))[:, None])[:, 0]
        if not hasattr(self, "llm2vae"):
            return RowLosses(ce, chunk.ce_weights, gen[:1].float().mean(dim=-1))
        predicted = self.llm2vae(gen[pad(chunk.mse_rows, (0, 1))]).float()
        target = pad(flow.target[chunk.mse_rows], (0, 0, 0, 1))
        return RowLosses(ce, chunk.ce_weights, (predicted - target).square().mean(dim=-1))
