"""The baseline: a packer as trainers have them today, lists that grow by ranges and become tensors at the end.

It gives what a PackPlan holds but for the attention plan. It is written for speed as far as its way allows: lists are
extended, never appended to token by token, and grids and rows are computed by tensors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megabagel.packing.geometry import Geometry
from megabagel.packing.splits import TEXT, VIT, Piece, PlannedSample

INTEGERS = (
    *("und_index", "gen_index", "position_ids", "text_ids", "text_positions", "vit_positions", "vit_seqlens"),
    *("latent_grids", "image_keys", "ce_positions", "ce_labels", "mse_positions"),
    *("sample_lens", "split_lens", "split_modes"),
)


def pack(samples: Sequence[PlannedSample], geometry: Geometry) -> dict[str, Tensor]:
    """Tensors named as in a PackPlan."""
    lists: dict[str, list] = {name: [] for name in (*INTEGERS, "timesteps", "ce_weights")}
    vit_grids, latent_grids = [], []
    position = 0
    for sample in samples:
        before = position
        for piece in sample.pieces:
            if piece.starts_split:
                lists["split_lens"].append(0)
                lists["split_modes"].append(piece.mode)
            lists["split_lens"][-1] += piece.length
            if piece.kind == TEXT:
                add_text(lists, piece, position, geometry)
            else:
                grid = table_positions(
                    piece.grid, geometry.table_side("vit_image" if piece.kind == VIT else "vae_image")
                )
                (vit_grids if piece.kind == VIT else latent_grids).append(grid)
                add_image(lists, piece, position, geometry)
            position += piece.length
        lists["sample_lens"].append(position - before)
    tensors = {name: torch.tensor(lists[name], dtype=torch.int64) for name in INTEGERS}
    tensors["timesteps"] = torch.tensor(lists["timesteps"], dtype=torch.float32)
    tensors["ce_weights"] = torch.tensor(lists["ce_weights"], dtype=torch.float32)
    none = torch.empty(0, dtype=torch.int64)
    tensors["vit_position_ids"] = torch.cat(vit_grids) if vit_grids else none
    tensors["latent_position_ids"] = torch.cat(latent_grids) if latent_grids else none
    row = torch.empty(position, dtype=torch.int64)
    row[tensors["und_index"]] = torch.arange(len(lists["und_index"]))
    row[tensors["gen_index"]] = torch.arange(len(lists["gen_index"]))
    for name in ("text", "vit", "ce", "mse"):
        tensors[f"{name}_rows"] = row[tensors.pop(f"{name}_positions")]
    return tensors


def add_text(lists: dict[str, list], piece: Piece, start: int, geometry: Geometry) -> None:
    ids, end = piece.text_ids.tolist(), start + piece.length
    lists["text_ids"].append(geometry.special_tokens.bos)
    lists["text_ids"].extend(ids)
    lists["text_ids"].append(geometry.special_tokens.eos)
    lists["text_positions"].extend(range(start, end))
    lists["und_index"].extend(range(start, end))
    lists["position_ids"].extend(range(piece.rope_start, piece.rope_start + piece.length))
    if piece.loss:
        lists["ce_positions"].extend(range(start, end - 1))
        lists["ce_labels"].extend(ids)
        lists["ce_labels"].append(geometry.special_tokens.eos)
        lists["ce_weights"].extend([(len(ids) + 1) ** -0.5] * (len(ids) + 1))


def add_image(lists: dict[str, list], piece: Piece, start: int, geometry: Geometry) -> None:
    special, body, last = geometry.special_tokens, piece.length - 2, start + piece.length - 1
    lists["text_ids"].extend([special.start_of_image, special.end_of_image])
    lists["text_positions"].extend([start, last])
    lists["position_ids"].extend([piece.rope_start] * piece.length)
    lists["und_index"].append(start)
    if piece.kind == VIT:
        lists["vit_positions"].extend(range(start + 1, last))
        lists["und_index"].extend(range(start + 1, last))
        lists["vit_seqlens"].append(body)
    else:
        lists["gen_index"].extend(range(start + 1, last))
        lists["timesteps"].extend([piece.timestep] * body)
        lists["latent_grids"].append(piece.grid)
        lists["image_keys"].append(piece.image_key)
        if piece.loss:
            lists["mse_positions"].extend(range(start + 1, last))
    lists["und_index"].append(last)


def table_positions(grid: tuple[int, int], side: int) -> Tensor:
    return (torch.arange(grid[0])[:, None] * side + torch.arange(grid[1])).flatten()
