"""The first pipeline stage's part: text, pictures to understand and latents become the rows of the two streams.

A rank computes the rows of its own chunk. Every weight is used on every step: a row that is dropped again receives a
dummy token and dummy features, so that gradient buckets complete and no rank waits when a chunk lacks text or images.
"""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding, scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import pad

from megabagel.config.schema import ModelConfig
from megabagel.models.flow import FlowTokens, TimestepEmbedder
from megabagel.models.position_tables import sincos_table
from megabagel.models.vision import VisionMLP
from megabagel.packing.chunk import Chunk
from megabagel.packing.plan import PackPlan


@dataclass
class StreamInputs:
    """Encoded content of one packed sequence, beside its PackPlan, in the plan's order."""

    vit_patches: Tensor | None  # [m, p*p*3] parameter dtype, in [-1, 1], of this rank's pictures; None: features given
    latents: Tensor  # [G * d] float32, clean: picture after picture, each [z, H, W] as the autoencoder gives it
    noise: Tensor  # [G, d] float32
    vit_features: Tensor | None = None  # [tokens of this rank's chunk, ViT hidden] of a tower that ran before


class UndEmbeddings(MegatronModule):
    """Text tokens and ViT features -> und stream rows."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, tp_group: torch.distributed.ProcessGroup):
        super().__init__(config)
        hidden, dtype = model.hidden_size, config.params_dtype
        self.word_embeddings = VocabParallelEmbedding(
            model.vocab_size, hidden, init_method=config.init_method, config=config, tp_group=tp_group
        )
        if model.visual_und:
            self.connector = VisionMLP(model.vit.hidden_size, hidden, hidden, model.connector_act, dtype)
            table = sincos_table(model.vit.max_num_patch_per_side, hidden)
            self.register_buffer("vit_pos_embed", table, persistent=False)

    def connect(self, features: Tensor, position_ids: Tensor) -> Tensor:
        """[n, ViT hidden] -> [n, hidden]: connector, position table."""
        features = self.connector(features)
        return features + self.vit_pos_embed[position_ids].to(features.dtype)

    def forward(self, plan: PackPlan, chunk: Chunk, features: Tensor | None) -> Tensor:
        """features [ViT tokens of the chunk + 1, ViT hidden], the last one a dummy -> [chunk.und_length, hidden]."""
        spare = chunk.und_length  # an extra row
        tokens = self.word_embeddings(pad(chunk.text_ids, (0, 1))[None])[0]
        rows = tokens.new_zeros(chunk.und_length + 1, tokens.shape[-1])
        rows = rows.index_add(0, pad(chunk.text_rows, (0, 1), value=spare), tokens)
        if features is not None:
            connected = self.connect(features, pad(plan.vit_position_ids[chunk.vit_tokens], (0, 1)))
            rows = rows.index_add(0, pad(chunk.vit_rows, (0, 1), value=spare), connected)
        return rows[:-1]


class GenEmbeddings(nn.Module):
    """Noised and clean latents -> gen stream rows."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.vae2llm = nn.Linear(model.latent_patch_size**2 * model.vae.z_channels, model.hidden_size, dtype=dtype)
        self.time_embedder = TimestepEmbedder(model.hidden_size, dtype)
        self.register_buffer(
            "latent_pos_embed", sincos_table(model.max_latent_size, model.hidden_size), persistent=False
        )

    def forward(self, plan: PackPlan, chunk: Chunk, flow: FlowTokens) -> Tensor:
        """-> [chunk.gen_length, hidden]."""
        times = self.time_embedder(pad(flow.times, (0, chunk.gen_length - len(flow.times))))
        return self.rows(flow.noised, times, self.places(plan, chunk))

    def places(self, plan: PackPlan, chunk: Chunk) -> Tensor:
        """What its place in its picture adds to each row, padding included: [chunk.gen_length, hidden]."""
        ids = plan.latent_position_ids[chunk.latents]
        return self.latent_pos_embed[pad(ids, (0, chunk.gen_length - len(ids)))].to(self.vae2llm.weight.dtype)

    def rows(self, noised: Tensor, times: Tensor, places: Tensor) -> Tensor:
        """noised [n, d], embedded times [chunk.gen_length, hidden], or [1, hidden] where it is the same of all."""
        return self.vae2llm(pad(noised, (0, 0, 0, len(places) - len(noised)))) + times + places


class InputEmbeddings(MegatronModule):
    """Both streams, concatenated (und first) and sharded by rows under sequence parallelism."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, tp_group: torch.distributed.ProcessGroup):
        super().__init__(config)
        self.hidden_size, self.freeze_und = model.hidden_size, model.freeze_und
        self.tp_group = tp_group
        self.und = UndEmbeddings(config, model, tp_group)
        self.gen = GenEmbeddings(model, config.params_dtype) if model.visual_gen else None

    def forward(self, plan: PackPlan, chunk: Chunk, flow: FlowTokens | None, features: Tensor | None) -> Tensor:
        """flow: of the chunk, None for a model that makes no images. -> [rows of the chunk (over tensor-parallel ranks
        with sequence parallelism), 1, hidden]."""
        und = self.und(plan, chunk, features)
        return self.joined(chunk, und, None if self.gen is None else self.gen(plan, chunk, flow))

    def joined(self, chunk: Chunk, und: Tensor, gen: Tensor | None) -> Tensor:
        """As `forward`, from the rows of the streams; gen None: nothing but padding."""
        if self.freeze_und:
            und = und.detach()
        if gen is None:
            gen = und.new_zeros(chunk.gen_length, self.hidden_size)
        streams = [und[:, None], gen[:, None]]
        if self.config.sequence_parallel:
            streams = [scatter_to_sequence_parallel_region(s, group=self.tp_group) for s in streams]
        return torch.cat(streams)
