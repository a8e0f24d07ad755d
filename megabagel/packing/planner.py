"""Splits of several samples become one PackPlan: every index, label, weight and segment of a packed sequence.

Vectorised numpy, O(tokens). It never sees pixels and decides nothing: order and dropout are settled.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megabagel.packing.geometry import Geometry, SpecialTokens, grid_position_ids
from megabagel.packing.plan import CAUSAL, NOISE, PackPlan
from megabagel.packing.splits import TEXT, VAE, VIT, Piece, PlannedSample

__all__ = ["Geometry", "PlannedSample", "SpecialTokens", "build_plan", "fixed_length"]


def fixed_length(max_num_tokens: int, tile: int) -> int:
    """Padded length of both streams together, a multiple of `tile`, that holds any pack of `max_num_tokens`."""
    return (max_num_tokens + 2 * tile) // tile * tile


def build_plan(
    samples: Sequence[PlannedSample], geometry: Geometry, tile: int, total_length: int | None = None
) -> PackPlan:
    """The plan of `samples`, packed in the given order.

    Each stream is padded to a multiple of `tile` with at least one padding row. With `total_length` (pipeline
    parallelism) the und stream takes all that the gen stream leaves, so both together always have that length.
    Raises ValueError when the samples do not fit into `total_length` or there is none.
    """
    if not samples:
        raise ValueError("a pack needs at least one sample")
    pieces = [piece for sample in samples for piece in sample.pieces]
    special = geometry.special_tokens
    kind = np.array([p.kind for p in pieces])
    is_text = kind == TEXT
    lens = np.array([p.length for p in pieces])
    ends = np.cumsum(lens)
    starts = ends - lens
    length = int(ends[-1])

    # Per sequence position: which piece it is in, what it is, its RoPE id.
    piece_of = np.repeat(np.arange(len(pieces)), lens)
    token_kind = kind[piece_of]
    token_kind[starts] = token_kind[ends - 1] = TEXT
    position_ids = np.array([p.rope_start for p in pieces])[piece_of]
    position_ids += np.where(is_text[piece_of], np.arange(length) - starts[piece_of], 0)

    # Each token's row in its own stream.
    in_gen = token_kind == VAE
    und_index, gen_index = np.flatnonzero(~in_gen), np.flatnonzero(in_gen)
    row = np.empty(length, dtype=np.int64)
    row[und_index], row[gen_index] = np.arange(und_index.size), np.arange(gen_index.size)
    und_length, gen_length = _stream_lengths(und_index.size, gen_index.size, tile, total_length)

    token_ids = np.full(length, -1, dtype=np.int64)  # -1: an image token
    token_ids[starts] = np.where(is_text, special.bos, special.start_of_image)
    token_ids[ends - 1] = np.where(is_text, special.eos, special.end_of_image)
    text_inside = (token_kind == TEXT) & is_text[piece_of]
    text_inside[starts] = text_inside[ends - 1] = False
    token_ids[text_inside] = _concatenate([p.text_ids for p in pieces if p.kind == TEXT])
    text_positions = np.flatnonzero(token_kind == TEXT)

    # Cross entropy: a text with loss predicts the next token everywhere but at its end; closing tokens on demand.
    label = np.append(token_ids[1:], -1)
    weight = (1.0 / np.sqrt(np.maximum(lens - 1, 1)))[piece_of].astype(np.float32)
    loss = np.array([p.loss for p in pieces])
    in_ce = (loss & is_text)[piece_of]
    in_ce[ends - 1] = False
    closing = np.array([p.special_token_label is not None for p in pieces])
    closing_positions = ends[closing] - 1
    in_ce[closing_positions] = True
    label[closing_positions] = [p.special_token_label for p in pieces if p.special_token_label is not None]
    weight[closing_positions] = 1.0
    ce_positions = np.flatnonzero(in_ce)

    vit = [p for p in pieces if p.kind == VIT]
    vae = [p for p in pieces if p.kind == VAE]
    vae_lens = np.array([p.length - 2 for p in vae], dtype=np.int64)
    key_length = len(samples[0].key) + 1

    starts_split = np.array([p.starts_split for p in pieces])
    split_starts = starts[starts_split]
    split_modes = np.array([p.mode for p in pieces])[starts_split]
    sample_lens = np.array([sample.num_tokens for sample in samples])
    attention_index, problems = attention_problems(split_starts, split_modes, sample_lens, length)

    def long(values) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))

    return PackPlan(
        und_length=und_length,
        gen_length=gen_length,
        und_index=long(und_index),
        gen_index=long(gen_index),
        position_ids=long(position_ids),
        text_ids=long(token_ids[text_positions]),
        text_rows=long(row[text_positions]),
        vit_rows=long(row[token_kind == VIT]),
        vit_position_ids=long(_position_ids(vit, geometry.vit_max_num_patch_per_side, geometry.interpolate_pos)),
        vit_seqlens=long([p.length - 2 for p in vit]),
        latent_position_ids=long(_position_ids(vae, geometry.max_latent_size, geometry.interpolate_pos)),
        latent_grids=long(np.array([p.grid for p in vae], dtype=np.int64).reshape(-1, 2)),
        timesteps=torch.from_numpy(np.repeat(np.array([p.timestep for p in vae], dtype=np.float32), vae_lens)),
        image_keys=long(np.array([p.image_key for p in vae], dtype=np.int64).reshape(-1, key_length)),
        ce_rows=long(row[ce_positions]),
        ce_labels=long(label[ce_positions]),
        ce_weights=torch.from_numpy(weight[ce_positions]),
        mse_rows=long(row[in_gen & loss[piece_of]]),
        sample_lens=long(sample_lens),
        split_lens=long(np.diff(split_starts, append=length)),
        split_modes=long(split_modes),
        attention_index=long(attention_index),
        problems=long(problems),
    )


def _stream_lengths(num_und: int, num_gen: int, tile: int, total_length: int | None) -> tuple[int, int]:
    """Padded lengths of both streams: multiples of `tile`, each with at least one padding row."""
    gen_length = -(-(num_gen + 1) // tile) * tile
    und_length = -(-(num_und + 1) // tile) * tile
    if total_length is None:
        return und_length, gen_length
    if total_length % tile:
        raise ValueError(
            f"the fixed pack length {total_length} must be a multiple of {tile} (tensor x context parallel size x 16)"
        )
    if und_length + gen_length > total_length:
        raise ValueError(
            f"a pack of {num_und} text and ViT tokens and {num_gen} latent tokens pads to {und_length + gen_length} "
            f"rows, more than the fixed length {total_length}; raise data.max_num_tokens"
        )
    return total_length - gen_length, gen_length


def attention_problems(
    split_starts: np.ndarray, split_modes: np.ndarray, sample_lens: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """attention_index [L] and problems [P, 5] of a PackPlan.

    Neighbouring causal splits of a sample become one problem: they see what one text would.
    """
    noised = np.repeat(split_modes == NOISE, np.diff(split_starts, append=length))
    attention_index = np.concatenate([np.flatnonzero(~noised), np.flatnonzero(noised)])
    row_of = np.empty(length, dtype=np.int64)
    row_of[attention_index] = np.arange(length)
    shared_before = np.concatenate([[0], np.cumsum(~noised)])  # per sequence position

    sample_starts = np.cumsum(sample_lens) - sample_lens
    sample_of = np.searchsorted(sample_starts, split_starts, side="right") - 1
    causal = split_modes == CAUSAL
    continues = np.zeros(len(split_starts), dtype=bool)
    continues[1:] = causal[1:] & causal[:-1] & (sample_of[1:] == sample_of[:-1])
    starts, sample_of, causal = split_starts[~continues], sample_of[~continues], causal[~continues]
    prefix_start = shared_before[sample_starts[sample_of]]
    problems = [
        row_of[starts],
        np.diff(starts, append=length),
        prefix_start,
        shared_before[starts] - prefix_start,
        causal,
    ]
    return attention_index, np.stack([column.astype(np.int64) for column in problems], axis=1)


def _position_ids(pieces: Sequence[Piece], table_side: int, interpolate: bool) -> np.ndarray:
    return _concatenate([grid_position_ids(*p.grid, table_side, interpolate) for p in pieces])


def _concatenate(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)
