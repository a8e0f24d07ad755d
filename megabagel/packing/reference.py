"""The planner in plain Python, one token after the other: what a PackPlan means, in the order in which one reads it.

The C++ planner is tested against it, and it does the work where nothing is compiled. It shares no code with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt

import torch

from megabagel.packing.geometry import Geometry, SpecialTokens, grid_position_ids
from megabagel.packing.plan import CAUSAL, NOISE, PackPlan
from megabagel.packing.splits import TEXT, VIT, Piece, PlannedSample


@dataclass
class _Tables:
    """The tables of a PackPlan under construction, and what the attention order is made of."""

    und_index: list[int] = field(default_factory=list)
    gen_index: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    text_ids: list[int] = field(default_factory=list)
    text_rows: list[int] = field(default_factory=list)
    vit_rows: list[int] = field(default_factory=list)
    vit_position_ids: list[int] = field(default_factory=list)
    vit_seqlens: list[int] = field(default_factory=list)
    latent_position_ids: list[int] = field(default_factory=list)
    latent_grids: list[tuple[int, int]] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    image_keys: list[tuple[int, ...]] = field(default_factory=list)
    ce_rows: list[int] = field(default_factory=list)
    ce_labels: list[int] = field(default_factory=list)
    ce_weights: list[float] = field(default_factory=list)
    mse_rows: list[int] = field(default_factory=list)
    sample_lens: list[int] = field(default_factory=list)
    splits: list["_Split"] = field(default_factory=list)


@dataclass
class _Split:
    sample: int
    mode: int
    positions: list[int] = field(default_factory=list)  # in the sequence


def build_plan(
    samples: Sequence[PlannedSample], geometry: Geometry, tile: int, total_length: int | None = None
) -> PackPlan:
    """See `planner.build_plan`."""
    if not samples:
        raise ValueError("a pack needs at least one sample")
    tables = _Tables()
    for number, sample in enumerate(samples):
        before = len(tables.position_ids)
        for piece in sample.pieces:
            if piece.starts_split:
                tables.splits.append(_Split(number, piece.mode))
            _add_piece(tables, piece, geometry)
        tables.sample_lens.append(len(tables.position_ids) - before)
    und_length, gen_length = _stream_lengths(len(tables.und_index), len(tables.gen_index), tile, total_length)
    attention_index, problems = _attention(tables.splits)

    def long(values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64)

    return PackPlan(
        und_length=und_length,
        gen_length=gen_length,
        und_index=long(tables.und_index),
        gen_index=long(tables.gen_index),
        position_ids=long(tables.position_ids),
        text_ids=long(tables.text_ids),
        text_rows=long(tables.text_rows),
        vit_rows=long(tables.vit_rows),
        vit_position_ids=long(tables.vit_position_ids),
        vit_seqlens=long(tables.vit_seqlens),
        latent_position_ids=long(tables.latent_position_ids),
        latent_grids=long(tables.latent_grids).reshape(-1, 2),
        timesteps=torch.tensor(tables.timesteps, dtype=torch.float32),
        image_keys=long(tables.image_keys).reshape(-1, len(samples[0].key) + 1),
        ce_rows=long(tables.ce_rows),
        ce_labels=long(tables.ce_labels),
        ce_weights=torch.tensor(tables.ce_weights, dtype=torch.float32),
        mse_rows=long(tables.mse_rows),
        sample_lens=long(tables.sample_lens),
        split_lens=long([len(split.positions) for split in tables.splits]),
        split_modes=long([split.mode for split in tables.splits]),
        attention_index=long(attention_index),
        problems=long(problems).reshape(-1, 5),
    )


def _add_piece(tables: _Tables, piece: Piece, geometry: Geometry) -> None:
    """Start token, body, end token."""
    special = geometry.special_tokens
    if piece.kind == TEXT:
        _add_text(tables, piece, special)
    else:
        _add_text_token(tables, special.start_of_image, piece.rope_start)
        _add_image_body(tables, piece, geometry)
        _add_text_token(tables, special.end_of_image, piece.rope_start)
    if piece.special_token_label is not None:
        _add_ce_row(tables, piece.special_token_label, 1.0)


def _add_text(tables: _Tables, piece: Piece, special: SpecialTokens) -> None:
    ids = [special.bos, *piece.text_ids.tolist(), special.eos]
    for i, token_id in enumerate(ids):
        _add_text_token(tables, token_id, piece.rope_start + i)
        if piece.loss and i + 1 < len(ids):
            _add_ce_row(tables, ids[i + 1], 1 / sqrt(len(ids) - 1))


def _add_text_token(tables: _Tables, token_id: int, rope: int) -> None:
    tables.text_ids.append(token_id)
    tables.text_rows.append(len(tables.und_index))
    tables.und_index.append(_add_position(tables, rope))


def _add_ce_row(tables: _Tables, label: int, weight: float) -> None:
    """The token that was added last predicts `label`."""
    tables.ce_rows.append(len(tables.und_index) - 1)
    tables.ce_labels.append(label)
    tables.ce_weights.append(weight)


def _add_image_body(tables: _Tables, piece: Piece, geometry: Geometry) -> None:
    kind = "vit_image" if piece.kind == VIT else "vae_image"
    positions = grid_position_ids(*piece.grid, geometry.table_side(kind), geometry.interpolate_pos).tolist()
    if piece.kind == VIT:
        tables.vit_seqlens.append(len(positions))
    else:
        tables.latent_grids.append(piece.grid)
        tables.image_keys.append(piece.image_key)
    for table_position in positions:
        position = _add_position(tables, piece.rope_start)
        if piece.kind == VIT:
            tables.vit_rows.append(len(tables.und_index))
            tables.vit_position_ids.append(table_position)
            tables.und_index.append(position)
            continue
        if piece.loss:
            tables.mse_rows.append(len(tables.gen_index))
        tables.latent_position_ids.append(table_position)
        tables.timesteps.append(piece.timestep)
        tables.gen_index.append(position)


def _add_position(tables: _Tables, rope: int) -> int:
    """One more token of the sequence, in the split that was opened last; its position."""
    position = len(tables.position_ids)
    tables.position_ids.append(rope)
    tables.splits[-1].positions.append(position)
    return position


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


def _attention(splits: list[_Split]) -> tuple[list[int], list[list[int]]]:
    """The attention order and its problems: who sees which rows."""
    shared = [position for split in splits if split.mode != NOISE for position in split.positions]
    noised = [position for split in splits if split.mode == NOISE for position in split.positions]
    order = shared + noised
    row_of = {position: row for row, position in enumerate(order)}
    problems: list[list[int]] = []
    num_shared = 0  # tokens seen so far that later splits may see
    sample, sample_start, previous_mode = -1, 0, NOISE
    for split in splits:
        if split.sample != sample:
            sample, sample_start, previous_mode = split.sample, num_shared, NOISE
        if split.mode == previous_mode == CAUSAL:
            problems[-1][1] += len(split.positions)  # neighbouring texts see what one would
        else:
            start, prefix = row_of[split.positions[0]], num_shared - sample_start
            problems.append([start, len(split.positions), sample_start, prefix, int(split.mode == CAUSAL)])
        num_shared += 0 if split.mode == NOISE else len(split.positions)
        previous_mode = split.mode
    return order, problems
