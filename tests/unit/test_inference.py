"""Inference: what is read piece by piece gives the rows of one pass through the model that trains; requests do not
disturb each other; guidance and draws do what they say."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from megabagel.checkpoint.hf import load_weights, open_source
from megabagel.config.errors import ConfigError
from megabagel.inference import FlowSettings, Generator, Guidance, TextSettings, load
from megabagel.inference.guidance import guide
from megabagel.inference.load import inference_config
from megabagel.inference.network import Network
from megabagel.inference.rows import picture
from megabagel.inference.text import choose
from megabagel.models.build import build_stages
from megabagel.models.flow import FlowTokens, flow_times
from megabagel.models.routing import route
from megabagel.packing.chunk import chunk_of
from megabagel.packing.planner import build_plan
from megabagel.packing.sample import Item, Sample
from megabagel.packing.splits import VAE, plan_sample
from megabagel.runtime import distributed

CASE = Path(__file__).parents[1] / "golden" / "public-basic" / "ckpt"
FEW_STEPS = FlowSettings(num_timesteps=4)


@pytest.fixture(scope="module")
def bagel():
    yield load(CASE)
    distributed.destroy()


@dataclasses.dataclass
class Content:
    """An item of a sample and what the model is given of it."""

    item: Item
    grid: tuple[int, int] | None = None
    values: Tensor | None = None  # patches or latent tokens
    time: float = 0.0  # raw
    cuts: tuple[int, ...] = ()  # a text is read up to here, then on


@st.composite
def interleavings(draw) -> list[Content]:
    """One to six items; the geometry of the golden case."""
    contents = []
    for number in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["text", "vit_image", "vae_image", "noised"]))
        if kind == "text":
            ids = draw(st.lists(st.integers(0, 499), min_size=1, max_size=9))
            cuts = draw(st.sets(st.integers(1, len(ids) + 1), max_size=3))
            contents.append(Content(Item("text", text_ids=ids), cuts=tuple(sorted(cuts))))
            continue
        grid = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        stride, width = (14, 588) if kind == "vit_image" else (16, 16)
        size = grid[0] * stride, grid[1] * stride
        item = Item("vit_image" if kind == "vit_image" else "vae_image", loss=kind == "noised", size=size)
        generator = torch.Generator().manual_seed(draw(st.integers(0, 9)) + number)
        values = torch.randn(grid[0] * grid[1], width, generator=generator)
        contents.append(Content(item, grid, values, draw(st.floats(-2, 2))))
    return contents


def of_one_pass(network: Network, contents: list[Content]) -> tuple[Tensor, Tensor]:
    """Final und and gen rows as training computes them: the planner's plan, no cache."""
    stage = network.stage
    sample = Sample([content.item for content in contents], (0,), "group", "origin")
    times = [content.time for content in contents if content.item.loss]
    plan = build_plan([plan_sample(sample, network.geometry, timesteps=times)], network.geometry, 16)
    chunk = chunk_of(plan, 0, 1)
    head_dim, base = stage.config.kv_channels, stage.model_config.rotary_base
    routing = route(plan, chunk, 0, 1, head_dim, base, "sdpa", network.device, torch.float32)

    def values(kind: str, width: int) -> Tensor:
        return torch.cat([torch.empty(0, width), *[c.values for c in contents if c.item.type == kind]])

    flow = FlowTokens(flow_times(plan.timesteps, 1.0), values("vae_image", 16))
    features = None
    if len(plan.vit_seqlens):
        features = stage.vision(values("vit_image", 588), plan.vit_position_ids, plan.vit_seqlens.tolist())
        features = pad(features, (0, 0, 0, 1))
    with torch.no_grad():
        hidden = stage.embeddings(plan, chunk, flow, features)
        hidden = stage.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=routing)
        und, gen = stage.heads.final_hidden(hidden, routing)
    return und[: len(plan.und_index)], gen[: len(plan.gen_index)]


def piece_by_piece(network: Network, contents: list[Content]) -> tuple[Tensor, Tensor]:
    """The same rows from a context that reads one item after the other."""
    special, context = network.geometry.special_tokens, network.empty_context()
    und, gen = [], [torch.empty(0, network.stage.config.hidden_size)]
    for content in contents:
        if content.grid is None:
            ids = [special.bos, *content.item.text_ids, special.eos]
            bounds = [0, *content.cuts, len(ids)]
            parts = [ids[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
            und += [network.read_tokens([context], [part])[0] for part in parts]
            continue
        noised = content.item.loss
        time = flow_times(torch.tensor([content.time if noised else -torch.inf]), 1.0).item()
        kind = VAE if content.item.type == "vae_image" else 1
        step = network.prepare([context], [picture(kind, content.grid)])
        for _ in range(2):  # looking does not change what is looked at
            if kind == VAE:
                hidden = step.run(network.embed([time]), content.values, None)
            else:
                hidden = step.run(None, None, network.features([content.values], [content.grid]))
        und.append(hidden.und[0])
        gen.append(hidden.gen[0])
        if not noised:
            step.keep()
    return torch.cat(und), torch.cat(gen)


@settings(max_examples=25, deadline=None)
@given(interleavings())
def test_reading_item_by_item_equals_one_pass_of_the_training_model(bagel, contents):
    expected = of_one_pass(bagel.network, contents)
    found = piece_by_piece(bagel.network, contents)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"und_num_experts": 4, "gen_num_experts": 2},
        {"layer_variant": "moe"},
        {"layer_variant": "dense", "tie_word_embeddings": True},
        {"visual_und": False},
        {"visual_gen": False},
    ],
)
def test_models_of_every_kind_read_item_by_item(bagel, change):
    config = inference_config(CASE, True, None, None, None)
    config.model, config.checkpoint.init_from = dataclasses.replace(config.model, **change), None
    (stage,) = build_stages(config, bagel.network.device)
    load_weights([stage], open_source(config))
    network = Network(stage.eval(), bagel.network.geometry)
    contents = [Content(Item("text", text_ids=[5, 6, 7]), cuts=(2,))]
    generator = torch.Generator().manual_seed(0)
    if config.model.visual_und:
        item = Item("vit_image", size=(28, 42))
        contents.append(Content(item, (2, 3), torch.randn(6, 588, generator=generator)))
    if config.model.visual_gen:
        values = torch.randn(6, 16, generator=generator)
        contents += [
            Content(Item("vae_image", loss=noised, size=(32, 48)), (2, 3), values, 0.5) for noised in (False, True)
        ]
    contents.append(Content(Item("text", text_ids=[8])))
    expected = of_one_pass(network, contents)
    for ours, theirs in zip(piece_by_piece(network, contents), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TextSettings(max_tokens=0), "max_tokens 0 .* at least 1"),
        (lambda: TextSettings(temperature=-1.0), "temperature -1.0 .* at least 0"),
        (lambda: TextSettings(top_p=1.5), "top_p 1.5 .* from 0 to 1"),
        (lambda: FlowSettings(num_timesteps=1), "num_timesteps 1 .* at least 2"),
        (lambda: FlowSettings(timestep_shift=0.0), "timestep_shift 0.0 .* above 0"),
        (lambda: Guidance(renorm_min=2.0), "renorm_min 2.0 .* from 0 to 1"),
        (lambda: Guidance(renorm="none"), "renorm none .* global, channel, text_channel"),
    ],
)
def test_settings_that_make_no_sense_are_one_sentence(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def grey(height: int, width: int, value: int) -> Image.Image:
    return Image.fromarray(np.full((height, width, 3), value, np.uint8))


def test_answers_do_not_depend_on_what_else_is_asked(bagel):
    prompts = ["How many lanterns are there?", [grey(50, 70, 90), "What is it?"], [grey(20, 20, 200), "And", "this?"]]
    sampled = TextSettings(max_tokens=7, temperature=1.0, top_p=0.9)
    together = bagel.answers(prompts, sampled, seeds=[5, 6, 7])
    alone = [bagel.answers([p], sampled, seeds=[s])[0] for p, s in zip(prompts, [5, 6, 7], strict=True)]
    assert together == alone
    assert bagel.answers(prompts[:1], sampled, seeds=[8]) != together[:1]


def test_pictures_do_not_depend_on_what_else_is_drawn_and_edits_keep_their_size(bagel):
    prompts = ["A blue house", [grey(48, 80, 30), "Make it red"], [grey(64, 32, 220), "Make it a little darker"]]
    together = bagel.pictures(prompts, FEW_STEPS, seeds=[1, 2, 3])
    assert [drawn.image.size for drawn in together] == [(128, 128), (128, 80), (64, 128)]
    for prompt, seed, drawn in zip(prompts, [1, 2, 3], together, strict=True):
        (alone,) = bagel.pictures([prompt], FEW_STEPS, seeds=[seed])
        difference = np.asarray(alone.image).astype(int) - np.asarray(drawn.image).astype(int)
        assert abs(difference).max() <= 1
    (other,) = bagel.pictures(prompts[:1], FEW_STEPS, seeds=[9])
    assert np.asarray(other.image).tobytes() != np.asarray(together[0].image).tobytes()


def test_a_thought_is_read_before_the_picture_is_drawn(bagel):
    settings = TextSettings(max_tokens=5)
    size = {"height": 32, "width": 32}
    (plain,) = bagel.pictures(["A blue house"], FEW_STEPS, **size)
    (drawn,) = bagel.pictures(["A blue house"], FEW_STEPS, think=True, thinking=settings, **size)
    (told,) = bagel.pictures(["A blue house"], FEW_STEPS, system_prompt="Think first.", **size)
    assert plain.thought is None and told.thought is None and drawn.thought
    assert len({np.asarray(one.image).tobytes() for one in (plain, drawn, told)}) == 3


def test_turns_are_read_before_the_next_one(bagel):
    settings = TextSettings(max_tokens=4)
    size = {"height": 32, "width": 48}
    ((first, drawn, second),) = bagel.interleaved(["A tale"], ["text", "picture", "text"], FEW_STEPS, settings, **size)
    assert drawn.size == (48, 32)
    ((same, other),) = bagel.interleaved(["A tale"], ["text", "text"], FEW_STEPS, settings)
    assert same == first and other != second


def test_a_size_that_cannot_be_made_is_one_sentence(bagel):
    with pytest.raises(ConfigError, match="33 x 128 pixels .* both sides must be multiples of 16 from 16 to 128"):
        bagel.pictures(["A blue house"], FEW_STEPS, height=33)


def test_a_text_only_model_refuses_pictures(bagel):
    blind = Generator(bagel.network, bagel.tokenizer, None)
    with pytest.raises(ConfigError, match="makes no pictures"):
        blind.pictures(["A blue house"])


def test_a_missing_model_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="there is no folder .*nothing; give a BAGEL folder, a run folder"):
        inference_config(tmp_path / "nothing", True, None, None, None)


def test_more_probable_tokens_are_drawn_more_often_and_the_tail_never():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = torch.tensor([choose(logits, TextSettings(temperature=1.0, top_p=0.9), 0, n) for n in range(600)])
    shares = drawn.bincount(minlength=4) / 600
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.06, rtol=0)
    assert choose(logits, TextSettings(), 0, 0) == 0
    assert choose(logits, TextSettings(temperature=1.0, top_p=0.0), 3, 0) == 0


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_guidance_follows_the_formula_and_never_lengthens(renorm):
    v, t, i = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)).unbind()
    settings = Guidance(4.0, 1.5, renorm=renorm)
    text_only = t + 4.0 * (v - t)
    found = guide(v, t, i, settings)
    if renorm == "text_channel":
        text_only = text_only * (v.norm(dim=1) / text_only.norm(dim=1)).clamp(max=1)[:, None]
        torch.testing.assert_close(found, i + 1.5 * (text_only - i))
        return
    expected = i + 1.5 * (text_only - i)
    dims = {} if renorm == "global" else {"dim": 1, "keepdim": True}
    torch.testing.assert_close(found, expected * (v.norm(**dims) / expected.norm(**dims)).clamp(max=1))
    longest = guide(v, t, i, dataclasses.replace(settings, renorm_min=1.0))
    torch.testing.assert_close(longest, expected)


def test_guidance_acts_only_inside_its_interval():
    guidance = Guidance(interval=(0.4, 0.9))
    assert [guidance.acts_at(t) for t in (0.4, 0.41, 0.9, 0.91)] == [False, True, True, False]


def test_whole_tiles_of_rows_change_nothing(bagel):
    """Linears that want rows in every stream get some; they belong to nobody."""
    image = Image.fromarray(np.arange(48 * 32 * 3, dtype=np.uint8).reshape(48, 32, 3))
    tiled = Network(bagel.network.stage, bagel.network.geometry)
    tiled._multiple = tiled._least = 16
    both = [bagel, Generator(tiled, bagel.tokenizer, bagel.autoencoder)]
    ours, theirs = ([one.answers(["What?", [image, "Why?"]], TextSettings(max_tokens=4))] for one in both)
    assert ours == theirs
    ours, theirs = (one.pictures(["A cat."], FEW_STEPS, height=32, width=32)[0].image for one in both)
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1
