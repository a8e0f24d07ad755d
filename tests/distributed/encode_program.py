"""Run by test_encode.py on 4 ranks: the encode phase and the spread ViT in several layouts against a rank that
works alone."""

import copy
import dataclasses
import warnings

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn.functional import pad

from megabagel.config.folder import read_model_config
from megabagel.config.schema import Config, ParallelConfig
from megabagel.data.broadcast import broadcast_pack
from megabagel.data.pack import Pack
from megabagel.models.autoencoder import Autoencoder
from megabagel.models.embeddings import StreamInputs
from megabagel.models.vision import VisionTower
from megabagel.models.vision_spread import spread_features
from megabagel.packing.chunk import chunk_of
from megabagel.packing.geometry import SpecialTokens, geometry_of
from megabagel.packing.plan import PackPlan
from megabagel.packing.planner import build_plan
from megabagel.packing.sample import Item, Sample
from megabagel.packing.splits import plan_sample
from megabagel.runtime import failure
from megabagel.runtime.distributed import Layout, destroy, initialize
from megabagel.training.encode import Encoder
from megabagel.training.encode_latents import moments_of
from megabagel.training.encode_vision import features_of
from tests.tiny_data import CHECKPOINT

# (tensor, context, pipeline) sizes of replicas of 1, 2 and 4 ranks; the rest is data parallel
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]
TILE = 16 * 4  # legal in every layout


def _pictures(draw: np.random.Generator, kind: str, sizes: list[tuple[int, int]]) -> list[Item]:
    return [Item(kind, pixels=draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def make_packs(config: Config, samples: list[tuple[list, list]]) -> list[Pack]:
    """A pack for every (sizes of VAE pictures, sizes of ViT pictures); the same on all ranks."""
    draw = np.random.default_rng(3)
    shape = geometry_of(config.model, SpecialTokens(501, 502, 503, 504))
    packs = []
    for number, (vae, vit) in enumerate(samples):
        items = [Item("text", text_ids=[5, 6, 7], loss=True)]
        items += _pictures(draw, "vae_image", vae) + _pictures(draw, "vit_image", vit)
        planned = plan_sample(Sample(items, (number,), "test", "test"), shape, [False] * len(items))
        images = [[torch.from_numpy(p).permute(2, 0, 1) for p in ps] for ps in (planned.vae_pixels, planned.vit_pixels)]
        packs.append(Pack(build_plan([planned], shape, tile=TILE), *images, ["test"], [(number,)], ["test"]))
    return packs


STEPS = {
    "mixed": [
        ([(32, 48), (16, 16), (32, 48), (64, 64)], [(28, 56), (14, 14), (56, 56)]),
        ([], [(28, 28)]),
        ([(48, 32)], []),
    ],
    "no picture at all": [([], []), ([], [])],
    "fewer pictures than ranks": [([(32, 32)], [])],
    "only pictures to see": [([], [(28, 42), (42, 28)])],
}


def with_stored(packs: list[Pack], vae: Autoencoder, vit: VisionTower, every: int) -> list[Pack]:
    """The packs, every so many pictures as moments or features that were computed before, one picture at a time."""
    found = []
    for pack in packs:
        ids = pack.plan.vit_position_ids.split(pack.plan.vit_seqlens.tolist())
        cpu = torch.device("cpu")
        moments = [moments_of(vae, [image], cpu, torch.float32)[0] for image in pack.vae_images[::every]]
        features = [features_of(vit, [i], [at], cpu)[0] for i, at in zip(pack.vit_images, ids, strict=True)][::every]
        vae_images, vit_images = list(pack.vae_images), list(pack.vit_images)
        vae_images[::every], vit_images[::every] = moments, features
        found.append(dataclasses.replace(pack, vae_images=vae_images, vit_images=vit_images))
    return found


def known_to_all(layout: Layout, packs: list[Pack]) -> list[Pack]:
    """The packs as the ranks of a replica have them: pictures on the source only."""
    sources = packs if layout.is_source else [None] * len(packs)
    return [broadcast_pack(pack, layout.replica_group, layout.source_rank) for pack in sources]


def check_inputs(layout: Layout, packs: list[Pack], found: list, expected: list[StreamInputs]) -> None:
    """What a rank of the layout got, against what a rank that works alone makes of pixels."""
    for pack, mine, whole in zip(packs, found, expected, strict=True):
        if not (layout.is_first_stage or layout.is_last_stage):
            assert mine is None
            continue
        torch.testing.assert_close(mine.latents, whole.latents, rtol=1e-5, atol=1e-5)
        assert torch.equal(mine.noise, whole.noise)
        tokens = chunk_of(pack.plan, layout.cp_rank, layout.cp_size).vit_tokens
        wanted = whole.vit_features[tokens] if layout.is_first_stage else whole.vit_features[:0]
        torch.testing.assert_close(mine.vit_features, wanted, rtol=1e-5, atol=1e-5)


def check(sizes: tuple[int, int, int], config: Config, vae: Autoencoder, vit: VisionTower) -> None:
    tp, cp, pp = sizes
    layout = initialize(
        ParallelConfig(tensor_model_parallel_size=tp, context_parallel_size=cp, pipeline_model_parallel_size=pp), seed=1
    )
    own_groups = [dist.new_group([rank], backend="gloo") for rank in range(layout.world_size)]
    alone = dataclasses.replace(
        layout,
        tp_rank=0,
        tp_size=1,
        cp_rank=0,
        cp_size=1,
        pp_rank=0,
        pp_size=1,
        replica_ranks=(layout.rank,),
        replica_group=own_groups[layout.rank],
        replica_device_group=own_groups[layout.rank],
    )
    for name, samples in STEPS.items():
        packs = make_packs(config, samples)
        together, single = (Encoder(config, where, vae, vit) for where in (layout, alone))
        expected = single(packs)
        for every in (1, 2):
            stored = known_to_all(layout, with_stored(packs, vae, vit, every))
            check_inputs(layout, packs, together(stored), expected)
            assert every > 1 or together.balance is None
        known = known_to_all(layout, packs)
        check_inputs(layout, packs, together(known), expected)
        ranks = len(layout.replica_ranks)
        if name == "no picture at all":
            assert together.balance is None
        elif name == "fewer pictures than ranks":
            assert together.balance == ranks
        else:
            assert 1 <= together.balance <= ranks
        assert single.balance == (None if together.balance is None else 1)
        found, patches = Encoder(config, layout, vae)(known), Encoder(config, alone, vae)(packs)
        if layout.is_first_stage:
            for pack, own, all_of_it, whole in zip(packs, found, patches, expected, strict=True):
                check_spread(pack.plan, own.vit_patches, all_of_it.vit_patches, whole.vit_features, vit)
    parallel_state.destroy_model_parallel()


def check_spread(plan: PackPlan, own: Tensor, patches: Tensor, expected: Tensor, frozen: VisionTower) -> None:
    """Features of the rank's chunk from patches of its own pictures, and weight gradients of a loss that weighs every
    feature differently."""
    group = parallel_state.get_tensor_and_context_parallel_group()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    draw = torch.Generator().manual_seed(1)
    weights = torch.randn(expected.shape, generator=draw)
    single, mine = (copy.deepcopy(frozen).requires_grad_(True) for _ in range(2))
    if len(patches):
        whole = single(patches, plan.vit_position_ids, plan.vit_seqlens.tolist())
        (whole * weights).sum().backward()
    tokens = chunk_of(plan, *_chunk_numbers()).vit_tokens
    features = spread_features(mine, own, plan, group, tp_size)
    torch.testing.assert_close(features[:-1], expected[tokens], rtol=1e-5, atol=1e-5)
    assert not features[-1].any()
    (features * pad(weights[tokens], (0, 0, 0, 1), value=1.0)).sum().backward()
    for name, parameter in mine.named_parameters():
        dist.all_reduce(parameter.grad, group=group)
        reference = single.get_parameter(name).grad
        reference = torch.zeros_like(parameter) if reference is None else reference
        torch.testing.assert_close(parameter.grad, reference, rtol=1e-4, atol=1e-5)


def _chunk_numbers() -> tuple[int, int]:
    return parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()


def main() -> None:
    torch.manual_seed(0)
    config = Config()
    config.training.params_dtype = "fp32"
    config.model = read_model_config(str(CHECKPOINT), config.model)
    vae = Autoencoder(config.model.vae).eval().requires_grad_(False)
    vit = VisionTower(config.model.vit, torch.float32).requires_grad_(False)
    for sizes in LAYOUTS:
        check(sizes, config, vae, vit)
    destroy()
    print(f"encoding ok in {len(LAYOUTS)} layouts", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with failure.guard():
        main()
