"""The last pipeline stage's part: final norms, vocabulary head and latent head, on rows that carry a loss only.

The ranks of a tensor-parallel group report the losses of their chunk's rows, each one counted once. Every weight is in
the graph of every step, also without a row to work on.
"""

from typing import NamedTuple

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megabagel.config.schema import Config
from megabagel.models.flow import FlowTokens
from megabagel.models.loss_rows import LossRows
from megabagel.models.norm import RMSNorm
from megabagel.models.routing import Routing
from megabagel.models.vocabulary_head import VocabularyHead
from megabagel.ops.loss_rows import loss_row_gather


class ChunkLosses(NamedTuple):
    """Sums over a chunk's rows, for the gradient, and what they sum up, without one; all float32."""

    ce: Tensor  # [] nats, weighted under `ce_loss_reweighting`
    mse: Tensor  # [] of means over latent channels
    ce_rows: Tensor  # [Nc] not weighted
    mse_rows: Tensor  # [Nm], under sequence parallelism those of this rank's rows


class OutputHeads(MegatronModule):
    """Final hidden rows -> losses. In the dense variant, gen uses und's final norm."""

    def __init__(
        self, config: TransformerConfig, run: Config, tp_group: torch.distributed.ProcessGroup, own_lm_head: bool
    ):
        super().__init__(config)
        model, dtype = run.model, config.params_dtype
        self.tp_group, self.freeze_und = tp_group, model.freeze_und
        self.reweighting = run.training.ce_loss_reweighting
        self.chunk_rows = run.kernels.cross_entropy_chunk_rows
        norm = (model.hidden_size, model.layernorm_epsilon, dtype, config.sequence_parallel)
        self.und_norm = RMSNorm(*norm)
        self.gen_norm = None if model.layer_variant == "dense" else RMSNorm(*norm)
        self.lm_head = VocabularyHead(
            model.hidden_size,
            model.vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=not own_lm_head,
            tp_group=tp_group,
        )
        self.llm2vae = None
        if model.visual_gen:
            self.llm2vae = nn.Linear(model.hidden_size, model.latent_patch_size**2 * model.vae.z_channels, dtype=dtype)
            for parameter in self.llm2vae.parameters():
                # each rank runs it on its own rows: megatron-core sums the gradients of parameters with this mark
                parameter.sequence_parallel = config.sequence_parallel

    def final_hidden(self, hidden: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Normalised und and gen rows that this rank holds of the chunk, each [rows, hidden]."""
        lengths = routing.stream_lengths
        scale = sum(lengths) // hidden.shape[0]
        und, gen = hidden[:, 0].split([length // scale for length in lengths])
        und = self.und_norm(und)
        if self.freeze_und:
            und = und.detach()
        return und, (self.gen_norm or self.und_norm)(gen)

    def forward(
        self, hidden: Tensor, routing: Routing, rows: LossRows, flow: FlowTokens | None, lm_head_weight: Tensor | None
    ) -> ChunkLosses:
        """hidden [rows, 1, hidden] -> losses. `lm_head_weight`: the tied embedding, else None."""
        und, gen = self.final_hidden(hidden, routing)
        ce, ce_rows = self._text_loss(und, routing, rows, lm_head_weight)
        mse, mse_rows = self._latent_loss(gen, rows, flow)
        return ChunkLosses(ce, mse, ce_rows, mse_rows)

    def _text_loss(
        self, und: Tensor, routing: Routing, rows: LossRows, lm_head_weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the chunk's rows on every rank: the weighted sum and [Nc]."""
        chunk = routing.chunk
        hidden = rows.ce.gather(und, self.tp_group, self.config.sequence_parallel)
        weights = chunk.ce_weights if self.reweighting else torch.ones_like(chunk.ce_weights)
        return self.lm_head(hidden, chunk.ce_labels, weights, self.chunk_rows, lm_head_weight)

    def _latent_loss(self, gen: Tensor, rows: LossRows, flow: FlowTokens | None) -> tuple[Tensor, Tensor]:
        """Squared error of the velocity: summed over all ranks' rows, and of this rank's."""
        if self.llm2vae is None:
            nothing = gen[:0, 0].float()  # of the stream, which stays in the graph
            return nothing.sum(), nothing.detach()
        predicted = self.llm2vae(loss_row_gather(gen, rows.mse)).float()
        of_rows = (predicted - flow.target[rows.latents]).square().mean(dim=-1)
        total = of_rows.sum()
        if self.config.sequence_parallel:
            total = reduce_from_tensor_model_parallel_region(total, self.tp_group)
        return total, of_rows.detach()
