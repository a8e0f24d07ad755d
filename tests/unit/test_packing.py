"""The planner against the golden packs, and its invariants against brute force.

Reading and decoding are tested elsewhere; here samples are made by hand or from `meta.json`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megabagel.packing.geometry import Geometry, SpecialTokens, grid_position_ids
from megabagel.packing.plan import CAUSAL, FULL, NOISE, PackPlan
from megabagel.packing.planner import build_plan, fixed_length
from megabagel.packing.sample import Item, Sample
from megabagel.packing.splits import draw_dropout, plan_sample

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["public-basic", "public-wide"]
SPECIAL = SpecialTokens(bos=501, eos=502, start_of_image=503, end_of_image=504)
GEOMETRY = Geometry(latent_stride=16, max_latent_size=8, vit_patch_size=14, vit_max_num_patch_per_side=8, special_tokens=SPECIAL)


def mask_from_plan(plan: PackPlan, sample: int) -> torch.Tensor:
    """Dense attention mask of one sample, bool [len, len], from the plan's kv tables alone."""
    ends = plan.sample_lens.cumsum(0)
    end = int(ends[sample])
    start = end - int(plan.sample_lens[sample])
    mask = torch.zeros(end - start, end - start, dtype=torch.bool)
    for s in range(plan.split_lens.numel()):
        q0, q1 = plan.cu_seqlens_q[s : s + 2].tolist()
        if not start <= q0 < end:
            continue
        kv = plan.kv_index[plan.cu_seqlens_kv[s] : plan.cu_seqlens_kv[s + 1]]
        queries, keys = q1 - q0, kv.numel()
        allowed = torch.ones(queries, keys, dtype=torch.bool)
        if plan.split_modes[s] == CAUSAL:
            allowed = allowed.tril(keys - queries)
        assert not mask[q0 - start : q1 - start].any()
        mask[q0 - start : q1 - start, kv - start] = allowed
    return mask


def golden_plan(case: str, tile: int = 16, total_length: int | None = None) -> tuple[PackPlan, dict, dict]:
    """The plan of a golden case from its sample descriptions, with the tensors and the description it must reproduce."""
    meta = json.loads((GOLDEN / case / "meta.json").read_text())
    batch = load_file(GOLDEN / case / "batch.safetensors")
    config, ids = meta["config"], meta["special_token_ids"]
    geometry = Geometry(
        latent_stride=config["vae_image_downsample"],
        max_latent_size=config["max_latent_size"],
        vit_patch_size=config["vit_config"]["patch_size"],
        vit_max_num_patch_per_side=config["vit_max_num_patch_per_side"],
        interpolate_pos=config["interpolate_pos"],
        special_tokens=SpecialTokens(ids["bos_token_id"], ids["eos_token_id"], ids["start_of_image"], ids["end_of_image"]),
    )
    raw = batch["packed_timesteps"]
    per_image = iter(raw.split([h * w for h, w in meta["patchified_vae_latent_shapes"]]))
    planned = []
    for number, description in enumerate(meta["samples"]):
        items, dropped, timesteps = [], [], []
        for entry in description["sequence_plan"]:
            pixels = batch[entry["image"]].numpy() if "image" in entry else None
            items.append(
                Item(
                    type=entry["type"],
                    loss=bool(entry["loss"]),
                    enable_cfg=bool(entry["enable_cfg"]),
                    text_ids=entry.get("text_ids"),
                    pixels=pixels,
                    special_token_label=entry["special_token_label"] if entry["special_token_loss"] else None,
                )
            )
            dropped.append(entry["dropped"])
            if entry["type"] == "vae_image" and not entry["dropped"]:
                value = float(next(per_image)[0])
                if entry["loss"]:
                    timesteps.append(value)
        sample = Sample(items, key=(number, 0, 0), group=description["kind"], origin=f"{case} sample {number}")
        planned.append(plan_sample(sample, geometry, dropped, timesteps=timesteps))
    return build_plan(planned, geometry, tile, total_length), batch, meta


@pytest.mark.parametrize("case", CASES)
def test_planner_reproduces_the_golden_pack(case):
    plan, batch, meta = golden_plan(case)
    und, gen = plan.und_index, plan.gen_index

    def same(ours, theirs):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)

    assert plan.sequence_length == meta["sequence_length"]
    assert plan.sample_lens.tolist() == meta["sample_lens"]
    assert plan.split_lens.tolist() == meta["split_lens"]
    assert [["causal", "full", "noise"][m] for m in plan.split_modes] == meta["attn_modes"]
    same(plan.text_ids, batch["packed_text_ids"])
    same(und[plan.text_rows], batch["packed_text_indexes"])
    same(plan.position_ids, batch["packed_position_ids"])
    same(und[plan.vit_rows], batch["packed_vit_token_indexes"])
    same(plan.vit_position_ids, batch["packed_vit_position_ids"])
    same(plan.vit_seqlens, batch["vit_token_seqlens"].to(torch.int64))
    same(gen, batch["packed_vae_token_indexes"])
    same(und, batch["packed_und_token_indexes"].sort().values)
    same(plan.latent_position_ids, batch["packed_latent_position_ids"])
    assert plan.latent_grids.tolist() == meta["patchified_vae_latent_shapes"]
    same(plan.timesteps, batch["packed_timesteps"])
    same(gen[plan.mse_rows], batch["mse_loss_indexes"])
    same(und[plan.ce_rows], batch["ce_loss_indexes"])
    same(plan.ce_labels, batch["packed_label_ids"])
    same(plan.ce_weights, batch["ce_loss_weights"])


@pytest.mark.parametrize("case", CASES)
def test_plan_rebuilds_every_golden_mask(case):
    plan, batch, meta = golden_plan(case)
    for sample in range(len(meta["samples"])):
        assert torch.equal(mask_from_plan(plan, sample), batch[f"attn_mask.{sample}"])
