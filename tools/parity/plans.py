"""Saved batch tensors become the PackPlan of some of the samples, with maps back to the saved order.

Independent of the packer on purpose: it trusts the indices in batch.safetensors.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megabagel.packing.plan import CAUSAL, FULL, NOISE, PackPlan
from parity.case import Case
from parity.problems import attention_problems

_MODES = {"causal": CAUSAL, "full": FULL, "noise": NOISE}


@dataclass
class Share:
    """The part of a case that is one micro-batch. The maps are int64 indices into the saved tensors."""

    plan: PackPlan
    positions: Tensor  # [L'] sequence positions
    text: Tensor  # text tokens
    vit: Tensor  # ViT tokens
    latent: Tensor  # latent tokens
    ce: Tensor  # cross-entropy rows
    mse: Tensor  # MSE rows


def make_shares(case: Case, replica: int, replicas: int, stages: int, tile: int) -> list[Share]:
    """The micro-batches of one model replica: its samples dealt out in turn.

    Without pipeline stages there is one. With them there are as many as the interleaved schedule can take: a multiple
    of `stages`, no more than there are samples but at least `stages`, all padded to one length. What is left without a
    sample gets the first one without its losses, which adds nothing to the step.
    """
    count = stages * max(1, case.samples // replicas // stages) if stages > 1 else 1
    shares = []
    for number in range(replica, replicas * count, replicas):
        samples = list(range(case.samples))[number :: replicas * count]
        shares.append(make_share(case, samples, tile) if samples else _without_losses(make_share(case, [0], tile)))
    longest = max(share.plan.und_length + share.plan.gen_length for share in shares)
    if stages == 1:
        return shares
    return [replace(s, plan=replace(s.plan, und_length=longest - s.plan.gen_length)) for s in shares]


def _without_losses(share: Share) -> Share:
    none = torch.empty(0, dtype=torch.int64)
    plan = replace(share.plan, ce_rows=none, ce_labels=none, ce_weights=none.float(), mse_rows=none)
    return replace(share, plan=plan, ce=none, mse=none)


def stream_lengths(und: int, gen: int, tile: int) -> tuple[int, int]:
    """Multiples of `tile` with at least one padding row each."""
    return (und // tile + 1) * tile, (gen // tile + 1) * tile


def make_share(case: Case, samples: list[int], tile: int) -> Share:
    """The samples with these numbers, in this order, packed into one sequence."""
    batch, meta = case.batch, case.meta
    sample_lens = torch.tensor(meta["sample_lens"])
    split_lens = torch.tensor(meta["split_lens"])
    sample_ends = sample_lens.cumsum(0)
    positions = torch.cat([torch.arange(sample_ends[s] - sample_lens[s], sample_ends[s]) for s in samples])
    new = torch.full((int(sample_ends[-1]),), -1)
    new[positions] = torch.arange(len(positions))

    def among(name: str) -> tuple[Tensor, Tensor]:
        """Entries of an index tensor that belong to the samples: their numbers and their new positions."""
        indexes = batch.get(name, torch.empty(0, dtype=torch.int64))
        kept = (new[indexes] >= 0).nonzero()[:, 0]
        return kept, new[indexes[kept]]

    text, text_positions = among("packed_text_indexes")
    vit, vit_positions = among("packed_vit_token_indexes")
    latent, latent_positions = among("packed_vae_token_indexes")
    ce, ce_positions = among("ce_loss_indexes")
    mse, mse_positions = among("mse_loss_indexes")

    gen_index = latent_positions
    und_index = torch.cat([text_positions, vit_positions]).sort().values
    row = torch.empty(len(positions), dtype=torch.int64)
    row[und_index], row[gen_index] = torch.arange(len(und_index)), torch.arange(len(gen_index))
    und_length, gen_length = stream_lengths(len(und_index), len(gen_index), tile)

    split_ends = split_lens.cumsum(0)
    splits = new[split_ends - 1] >= 0
    lens = split_lens[splits]
    modes = torch.tensor([_MODES[m] for m in meta["attn_modes"]])[splits]
    kept_samples = sample_lens[samples]
    starts = lens.cumsum(0) - lens
    attention_index, problems = attention_problems(starts.numpy(), modes.numpy(), kept_samples.numpy(), len(positions))

    def pick(name: str, kept: Tensor) -> Tensor:
        return batch[name][kept] if len(kept) else torch.empty(0, dtype=torch.int64)

    grids = torch.tensor(meta["patchified_vae_latent_shapes"], dtype=torch.int64).reshape(-1, 2)
    plan = PackPlan(
        und_length=und_length,
        gen_length=gen_length,
        und_index=und_index,
        gen_index=gen_index,
        position_ids=batch["packed_position_ids"][positions],
        text_ids=pick("packed_text_ids", text),
        text_rows=row[text_positions],
        vit_rows=row[vit_positions],
        vit_position_ids=pick("packed_vit_position_ids", vit),
        vit_seqlens=_kept_groups(batch.get("vit_token_seqlens", torch.empty(0)).long(), vit),
        latent_position_ids=pick("packed_latent_position_ids", latent),
        latent_grids=grids[_kept_numbers(grids.prod(1), latent)],
        timesteps=pick("packed_timesteps", latent).float(),
        image_keys=torch.zeros(len(_kept_numbers(grids.prod(1), latent)), 1, dtype=torch.int64),
        ce_rows=row[ce_positions],
        ce_labels=pick("packed_label_ids", ce),
        ce_weights=pick("ce_loss_weights", ce).float(),
        mse_rows=row[mse_positions],
        sample_lens=kept_samples,
        split_lens=lens,
        split_modes=modes,
        attention_index=torch.from_numpy(attention_index),
        problems=torch.from_numpy(problems),
    )
    return Share(plan, positions, text, vit, latent, ce, mse)


def _kept_numbers(sizes: Tensor, kept: Tensor) -> Tensor:
    """Which of the groups of consecutive tokens, of these sizes, hold kept tokens."""
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    return owner[kept].unique()


def _kept_groups(sizes: Tensor, kept: Tensor) -> Tensor:
    return sizes[_kept_numbers(sizes, kept)]
