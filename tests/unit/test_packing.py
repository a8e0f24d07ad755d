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

from megabagel.config.schema import ModelConfig
from megabagel.packing.geometry import Geometry, SpecialTokens, geometry_of, grid_position_ids
from megabagel.packing.plan import CAUSAL, NOISE, PackPlan, Problem
from megabagel.packing.planner import build_plan, fixed_length
from megabagel.packing.sample import Item, Sample
from megabagel.packing.splits import PlannedSample, draw_dropout, plan_sample

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["public-basic", "public-wide"]
SPECIAL = SpecialTokens(bos=501, eos=502, start_of_image=503, end_of_image=504)
GEOMETRY = Geometry(16, max_latent_size=8, vit_patch_size=14, vit_max_num_patch_per_side=8, special_tokens=SPECIAL)


def mask_from_plan(plan: PackPlan, sample: int) -> torch.Tensor:
    """Dense attention mask of one sample, bool [len, len], from the plan's attention problems alone."""
    ends = plan.sample_lens.cumsum(0)
    end = int(ends[sample])
    start = end - int(plan.sample_lens[sample])
    mask = torch.zeros(end - start, end - start, dtype=torch.bool)
    order = plan.attention_index
    for problem in plan.problems.tolist():
        p = Problem(*problem)
        queries = order[p.start : p.start + p.length]
        if not start <= int(queries[0]) < end:
            continue
        keys = torch.cat([order[p.prefix_start : p.prefix_start + p.prefix_length], queries])
        allowed = torch.ones(p.length, keys.numel(), dtype=torch.bool)
        if p.causal:
            allowed = allowed.tril(p.prefix_length)
        assert not mask[queries - start].any()
        mask[(queries - start)[:, None], (keys - start)[None]] = allowed
    return mask


def golden_samples(case: str) -> tuple[list[PlannedSample], Geometry, dict, dict]:
    """The samples of a golden case from their descriptions, and the tensors and description to reproduce."""
    meta = json.loads((GOLDEN / case / "meta.json").read_text())
    batch = load_file(GOLDEN / case / "batch.safetensors")
    config, ids = meta["config"], meta["special_token_ids"]
    geometry = Geometry(
        latent_stride=config["vae_image_downsample"],
        max_latent_size=config["max_latent_size"],
        vit_patch_size=config["vit_config"]["patch_size"],
        vit_max_num_patch_per_side=config["vit_max_num_patch_per_side"],
        interpolate_pos=config["interpolate_pos"],
        special_tokens=SpecialTokens(
            ids["bos_token_id"], ids["eos_token_id"], ids["start_of_image"], ids["end_of_image"]
        ),
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
    return planned, geometry, batch, meta


def golden_plan(case: str, tile: int = 16, total_length: int | None = None) -> tuple[PackPlan, dict, dict]:
    """The plan of a golden case, and the tensors and description to reproduce."""
    planned, geometry, batch, meta = golden_samples(case)
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


def test_timestep_and_dropout_draws_depend_on_the_key_only():
    sample = make_sample([("text", 3, False), ("vae_image", (2, 2), True)], key=(0, 1, 2))
    first, again = plan_sample(sample, GEOMETRY, seed=5), plan_sample(sample, GEOMETRY, seed=5)
    other = plan_sample(make_sample([("vae_image", (2, 2), True)], key=(0, 1, 3)), GEOMETRY, seed=5)
    assert first.pieces[1].timestep == again.pieces[1].timestep != other.pieces[0].timestep
    sample.items[0].enable_cfg = True
    always, never = {"text": 1.0, "vae_image": 1.0}, {"text": 0.0, "vae_image": 0.0}
    assert draw_dropout(sample, always, seed=5) == [True, False]  # the image is not a condition
    assert draw_dropout(sample, never, seed=5) == [False, False]


# (type, token ids in a text or grid of an image, loss)
ITEM = st.one_of(
    st.tuples(st.just("text"), st.integers(0, 9), st.booleans()),
    st.tuples(st.just("vit_image"), st.tuples(st.integers(1, 4), st.integers(1, 4)), st.just(False)),
    st.tuples(st.just("vae_image"), st.tuples(st.integers(1, 4), st.integers(1, 4)), st.booleans()),
)


def make_sample(description, key=(0, 0, 0), geometry=GEOMETRY) -> Sample:
    items = []
    for type_, size, loss in description:
        if type_ == "text":
            items.append(Item("text", loss, text_ids=list(range(size))))
        else:
            stride = geometry.stride(type_)
            items.append(Item(type_, loss, pixels=np.zeros((size[0] * stride, size[1] * stride, 3), np.uint8)))
    return Sample(items, key=key, group="g", origin="made by hand")


def brute_force_mask(planned) -> torch.Tensor:
    """Token by token: who belongs to which piece, and the visibility rule in words."""
    owner = [i for i, piece in enumerate(planned.pieces) for _ in range(piece.length)]
    mask = torch.zeros(len(owner), len(owner), dtype=torch.bool)
    for q, a in enumerate(owner):
        for k, b in enumerate(owner):
            if a == b:
                mask[q, k] = k <= q or planned.pieces[a].mode != CAUSAL
            else:
                mask[q, k] = b < a and planned.pieces[b].mode != NOISE
    return mask


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(ITEM, min_size=1, max_size=5), min_size=1, max_size=4),
    st.sampled_from([16, 32]),
    st.booleans(),
)
def test_any_pack_is_covered_padded_and_visible_as_the_rule_says(samples, tile, fixed):
    planned = [plan_sample(make_sample(items, (i, 0, 0)), GEOMETRY) for i, items in enumerate(samples)]
    tokens = sum(p.num_tokens for p in planned)
    total = fixed_length(tokens, tile) if fixed else None
    plan = build_plan(planned, GEOMETRY, tile, total)

    assert plan.sequence_length == tokens
    assert torch.cat([plan.und_index, plan.gen_index]).sort().values.tolist() == list(range(tokens))
    rows = torch.cat([plan.text_rows, plan.vit_rows]).sort().values
    assert rows.tolist() == list(range(plan.und_index.numel()))
    assert plan.und_length % tile == 0 and plan.gen_length % tile == 0
    assert plan.und_length > plan.und_index.numel() and plan.gen_length > plan.gen_index.numel()
    if fixed:
        assert plan.und_length + plan.gen_length == total
    assert plan.split_lens.sum() == plan.sample_lens.sum() == tokens
    assert plan.attention_index.sort().values.tolist() == list(range(tokens)) and plan.problems[:, 1].sum() == tokens
    assert plan.latent_grids.prod(1).sum() == plan.latent_position_ids.numel() == plan.gen_index.numel()
    assert plan.vit_seqlens.sum() == plan.vit_rows.numel() == plan.vit_position_ids.numel()
    assert plan.mse_rows.tolist() == torch.isfinite(plan.timesteps).nonzero().flatten().tolist()
    assert plan.ce_rows.numel() == plan.ce_labels.numel() == plan.ce_weights.numel()
    for i, p in enumerate(planned):
        assert torch.equal(mask_from_plan(plan, i), brute_force_mask(p))


@pytest.mark.parametrize(
    "description",
    [
        [("text", 4, False)],
        [("text", 4, True)],
        [("vit_image", (1, 2), False)],
        [("vae_image", (2, 1), True)],
        [("vit_image", (1, 1), False), ("text", 0, True)],
    ],
)
def test_missing_categories_are_empty_tensors(description):
    plan = build_plan([plan_sample(make_sample(description), GEOMETRY)], GEOMETRY, 16, None)
    kinds = {d[0] for d in description}
    assert plan.latent_grids.shape == ((1, 2) if "vae_image" in kinds else (0, 2))
    assert plan.image_keys.shape == ((1, 4) if "vae_image" in kinds else (0, 4))
    assert plan.vit_seqlens.numel() == ("vit_image" in kinds)
    assert plan.ce_rows.numel() == sum(d[1] + 1 for d in description if d[0] == "text" and d[2])
    assert plan.timesteps.dtype == plan.ce_weights.dtype == torch.float32
    assert plan.problems.dtype == plan.attention_index.dtype == torch.int64
    assert plan.mse_rows.dtype == plan.ce_labels.dtype == torch.int64


def test_frames_of_a_clip_share_split_timestep_and_advance_by_frame_delta():
    frames = [("vae_image", (1, 1), True)] * 3
    sample = make_sample([("text", 1, False), *frames])
    for i, item in enumerate(sample.items[1:]):
        item.split_start, item.split_end = i == 0, i == 2
        item.frame_delta = 4 if i < 2 else None
    planned = plan_sample(sample, GEOMETRY, seed=1)
    plan = build_plan([planned], GEOMETRY, 16)
    assert plan.split_lens.tolist() == [3, 9] and plan.split_modes.tolist() == [CAUSAL, NOISE]
    assert plan.position_ids.tolist() == [0, 1, 2] + [3] * 3 + [7] * 3 + [11] * 3
    assert plan.timesteps.unique().numel() == 1


def test_interpolated_positions_spread_over_the_table():
    assert grid_position_ids(2, 3, 8, False).tolist() == [0, 1, 2, 8, 9, 10]
    assert grid_position_ids(1, 1, 8, True).tolist() == [0]
    assert grid_position_ids(2, 4, 8, True).tolist() == [0, 2, 4, 6, 32, 34, 36, 38]
    assert grid_position_ids(16, 1, 8, True).tolist() == [8 * (i // 2) for i in range(16)]


def test_images_that_do_not_fit_are_refused_in_one_sentence():
    sample = make_sample([("vae_image", (9, 1), True)])
    with pytest.raises(ValueError, match=r"made by hand: vae_image of 144x16 .* table has 8x8; .* to 128"):
        plan_sample(sample, GEOMETRY)
    sample.items[0].pixels = np.zeros((20, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="multiples of 16"):
        plan_sample(sample, GEOMETRY)
    planned = plan_sample(make_sample([("text", 30, True)]), GEOMETRY)
    with pytest.raises(ValueError, match="more than the fixed length 32; raise data.max_num_tokens"):
        build_plan([planned], GEOMETRY, 16, 32)
    with pytest.raises(ValueError, match="no item is left"):
        plan_sample(make_sample([("text", 3, False)]), GEOMETRY, [True])


def test_geometry_follows_the_model_configuration():
    model = ModelConfig(vocab_size=505)
    geometry = geometry_of(model, SPECIAL)
    assert (geometry.latent_stride, geometry.vit_patch_size) == (16, 14)
    assert (geometry.max_latent_size, geometry.vit_max_num_patch_per_side) == (64, 70)
    model.vocab_size = 504
    with pytest.raises(ValueError, match=r"ids up to 504, but model.vocab_size is 504; set it to at least 505"):
        geometry_of(model, SPECIAL)
