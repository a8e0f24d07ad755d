"""A model of one pipeline stage, asked for predictions: contexts get new rows, and hidden rows come back.

The rows go through the embeddings, decoder layers and final norms that train; tensor- and context-parallel ranks call
everything alike and all get whole results.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor
from torch.nn.functional import pad

from megabagel.config.precision import rows_per_tile
from megabagel.inference.attention import CachedRouting, CachedRows
from megabagel.inference.context import Context
from megabagel.inference.rows import Segment, picture, plan_rows, text
from megabagel.models.bagel import Bagel
from megabagel.models.routing import route
from megabagel.packing.chunk import chunk_of
from megabagel.packing.geometry import Geometry, grid_position_ids
from megabagel.packing.splits import VAE, VIT

Grid = tuple[int, int]


class HiddenRows(NamedTuple):
    """Rows after the final norms, segment after segment: of each the text and ViT rows, and the latent rows."""

    und: list[Tensor]  # [tokens, hidden]
    gen: list[Tensor]  # [tokens, hidden]


class Pass:
    """New rows of some contexts, ready to run: several times, as long as nothing is kept in a context."""

    def __init__(
        self,
        stage: Bagel,
        geometry: Geometry,
        contexts: Sequence[Context],
        segments: Sequence[Segment],
        multiple: int,
        least: int,
    ):
        self.stage, self.contexts, self.segments = stage, list(contexts), list(segments)
        plan = plan_rows(segments, [context.rope for context in contexts], geometry, multiple, least)
        routing = route(
            plan,
            chunk_of(plan, stage.cp_rank, stage.cp_size),
            stage.cp_rank,
            stage.cp_size,
            stage.config.kv_channels,
            stage.model_config.rotary_base,
            "sdpa",
            next(stage.parameters()).device,
            stage.config.params_dtype,
        )
        cached = [
            CachedRows(context.cache, slice(start, start + length), bool(causal))
            for context, (start, length, _, _, causal) in zip(contexts, plan.problems.tolist(), strict=True)
        ]
        self.routing = CachedRouting(**vars(routing), cached=cached)
        # from step to step only latents and their time change
        self._und: Tensor | None = None  # embedded und rows
        self._places: Tensor | None = None  # of gen rows

    @torch.inference_mode()
    def run(self, time: Tensor | None, latents: Tensor | None, features: Tensor | None) -> HiddenRows:
        """latents [G, d] of all latent tokens, at one `time` (see `Network.embed`), features [Nv, ViT hidden] of all
        ViT tokens; None where there is none."""
        stage, chunk, plan = self.stage, self.routing.chunk, self.routing.plan
        gen = None
        if latents is not None:
            if self._places is None:
                self._places = stage.embeddings.gen.places(plan, chunk)
            gen = stage.embeddings.gen.rows(latents[chunk.latents].to(stage.config.params_dtype), time, self._places)
        if features is not None:
            features = pad(features[chunk.vit_tokens], (0, 0, 0, 1))
        if self._und is None or features is not None:
            self._und = stage.embeddings.und(plan, chunk, features)
        hidden = stage.embeddings.joined(chunk, self._und, gen)
        hidden = stage.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=self.routing)
        und, gen = (self._whole(rows) for rows in stage.heads.final_hidden(hidden, self.routing))
        gen_lengths = [segment.length - 2 if segment.kind == VAE else 0 for segment in self.segments]
        und_lengths = [s.length - gen for s, gen in zip(self.segments, gen_lengths, strict=True)]
        return HiddenRows(
            list(und[: sum(und_lengths)].split(und_lengths)), list(gen[: sum(gen_lengths)].split(gen_lengths))
        )

    def _whole(self, rows: Tensor) -> Tensor:
        """This rank's rows of a stream -> the stream."""
        if self.stage.config.sequence_parallel:
            rows = _gather(rows, self.stage.heads.tp_group)
        return _gather(rows, parallel_state.get_context_parallel_group()) if self.stage.cp_size > 1 else rows

    def keep(self) -> None:
        """What ran last belongs to the contexts from now on."""
        for context, segment in zip(self.contexts, self.segments, strict=True):
            context.cache.keep(segment.length)
            context.rope += segment.rope_advance


def _gather(rows: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    whole = rows.new_empty(group.size() * len(rows), *rows.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, rows.contiguous(), group=group)
    return whole


class Network:
    """`stage` holds a whole model (no pipeline parallelism) with its weights."""

    def __init__(self, stage: Bagel, geometry: Geometry):
        self.stage, self.geometry = stage, geometry
        model = stage.model_config
        self.layers = model.num_layers
        self.latent_width = model.latent_patch_size**2 * model.vae.z_channels
        self.device = next(stage.parameters()).device
        # Transformer Engine's linears want rows, also for a stream that is empty, and FP8 whole tiles of them
        has_tiles = stage.config.transformer_impl == "transformer_engine"
        ranks = stage.cp_size * (stage.tp_size if stage.config.sequence_parallel else 1)  # that share a stream's rows
        self._multiple = ranks * (rows_per_tile(stage.kernels) if has_tiles else 1)
        self._least = self._multiple if has_tiles else 0

    def empty_context(self) -> Context:
        """One that has read nothing."""
        return Context.empty(self.layers)

    def prepare(self, contexts: Sequence[Context], segments: Sequence[Segment]) -> Pass:
        """A pass that gives each context, all of them different, its segment."""
        return Pass(self.stage, self.geometry, contexts, segments, self._multiple, self._least)

    def read_tokens(self, contexts: Sequence[Context], ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Each context reads its tokens, at least one. -> per context the hidden rows [tokens, hidden]."""
        step = self.prepare(contexts, [text(tokens) for tokens in ids])
        hidden = step.run(None, None, None)
        step.keep()
        return hidden.und

    def read_vit(self, contexts: Sequence[Context], patches: Sequence[Tensor], grids: Sequence[Grid]) -> None:
        """Each context reads a picture through the ViT: patches [rows * columns, p*p*3] in [-1, 1], and its grid."""
        step = self.prepare(contexts, [picture(VIT, grid) for grid in grids])
        step.run(None, None, self.features(patches, grids))
        step.keep()

    def read_latents(self, contexts: Sequence[Context], latents: Sequence[Tensor], grids: Sequence[Grid]) -> None:
        """Each context reads a picture as clean latent tokens [rows * columns, d], and its grid."""
        step = self.prepare(contexts, [picture(VAE, grid) for grid in grids])
        step.run(self.embed([0.0]), torch.cat(list(latents)).to(self.device), None)
        step.keep()

    @torch.inference_mode()
    def features(self, patches: Sequence[Tensor], grids: Sequence[Grid]) -> Tensor:
        """What the vision tower makes of pictures, see `read_vit`: [all tokens, ViT hidden]."""
        tower, model = self.stage.vision, self.stage.model_config
        side = model.vit.max_num_patch_per_side
        ids = [torch.tensor(grid_position_ids(*grid, side, model.interpolate_pos)) for grid in grids]
        rows = torch.cat(list(patches)).to(self.device, self.stage.config.params_dtype)
        return tower(rows, torch.cat(ids).to(self.device), [len(part) for part in ids])

    @torch.inference_mode()
    def embed(self, times: Sequence[float]) -> Tensor:
        """Times of latents, from 0 (clean) to 1 (noise), as the gen stream sees them: [n, hidden]."""
        return self.stage.embeddings.gen.time_embedder(torch.tensor(times, dtype=torch.float32, device=self.device))

    @torch.inference_mode()
    def logits(self, rows: Tensor) -> Tensor:
        """Hidden rows [n, hidden] of the und stream -> scores of the next token, float32 [n, vocabulary]."""
        heads = self.stage.heads
        tied = self.stage.model_config.tie_word_embeddings
        weight = self.stage.shared_embedding_or_output_weight() if tied else heads.lm_head.weight
        return gather_from_tensor_model_parallel_region(rows @ weight.t(), group=heads.tp_group).float()

    @torch.inference_mode()
    def velocity(self, rows: Tensor) -> Tensor:
        """Hidden rows [n, hidden] of the gen stream -> predicted noise - x0, float32 [n, d]."""
        return self.stage.heads.llm2vae(rows).float()
