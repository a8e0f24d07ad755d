"""flow_mix: the tokens of every picture as the autoencoder cuts them, on the path of the flow, and their target."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megabagel.models.autoencoder import patchify
from megabagel.ops import library
from megabagel.ops.flow import flow_mix, flow_mix_reference

compiled = pytest.mark.skipif(not library.LOADED, reason="the C++ operators are not built")


def make(
    grids: list[tuple[int, int]], patch: int, channels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The arguments of pictures of these sizes, and the pictures."""
    draw = torch.Generator().manual_seed(len(grids))
    width = patch**2 * channels
    pictures = [torch.randn(channels, r * patch, c * patch, generator=draw) for r, c in grids]
    latents = torch.cat([torch.empty(0), *(picture.flatten() for picture in pictures)])
    noise = torch.randn(latents.numel() // width, width, generator=draw)
    times = torch.rand(len(noise), generator=draw)
    return latents, torch.tensor(grids, dtype=torch.int64).reshape(-1, 2), noise, times, pictures


@settings(max_examples=120, deadline=None)
@given(
    grids=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=6),
    patch=st.integers(1, 3),
    channels=st.sampled_from([1, 3, 4, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_values_are_those_of_the_reference_and_of_patchify(grids, patch, channels, dtype):
    *arguments, pictures = make(grids, patch, channels)
    _, _, noise, times = arguments
    noised, target = flow_mix(*arguments, patch, dtype)
    expected, velocity = flow_mix_reference(*arguments, patch, dtype)
    clean = torch.cat([noise[:0], *(patchify(picture, patch) for picture in pictures)])
    assert torch.equal(target, velocity) and torch.equal(target, noise - clean)
    assert noised.dtype == expected.dtype == dtype
    torch.testing.assert_close(noised, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_clean_pictures_stay_as_they_are():
    latents, grids, noise, times, (picture,) = make([(4, 6)], 2, 16)
    noised, _ = flow_mix(latents, grids, noise, torch.zeros_like(times), 2, torch.float32)
    assert torch.equal(noised, patchify(picture, 2))


def test_a_million_tokens_of_pictures_of_all_sizes():
    grids = [(1000, 900), (1, 1), (3, 33_333)]
    *arguments, pictures = make(grids, 1, 2)
    noised, target = flow_mix(*arguments, 1, torch.float32)
    clean = torch.cat([patchify(picture, 1) for picture in pictures])
    _, _, noise, times = arguments
    assert torch.equal(target, noise - clean)
    torch.testing.assert_close(noised, clean + times[:, None] * target, rtol=1e-5, atol=1e-5)


@compiled
def test_what_does_not_fit_raises_a_sentence():
    latents, grids, noise, times, _ = make([(2, 3), (1, 4)], 2, 4)
    cases = [
        ((latents, grids + 1, noise, times), r"grid 0 of 3 x 4 tokens is no part of 10 tokens"),
        ((latents, grids[:1], noise, times), r"the grids hold 6 tokens, but there are 10"),
        ((latents, -grids, noise, times), r"grid 0 of -2 x -3"),
        ((latents, grids * 2**40, noise, times), r"grid 0 of \d+ x \d+ tokens is no part"),
        ((latents, grids.int(), noise, times), "grids must be int64"),
        ((latents[:-1], grids, noise, times), r"noise \[G, d\] needs latents \[G \* d\] and times \[G\]"),
        ((latents, grids, noise, times[:-1]), "needs latents"),
        ((latents.double(), grids, noise, times), "must be float32"),
    ]
    for arguments, message in cases:
        with pytest.raises(RuntimeError, match=message):
            flow_mix(*arguments, 2, torch.float32)
    with pytest.raises(RuntimeError, match="16 values of a token do not divide into patches of 3 x 3"):
        flow_mix(latents, grids, noise, times, 3, torch.float32)
    with pytest.raises(RuntimeError, match="can be float32 or bfloat16"):
        flow_mix(latents, grids, noise, times, 2, torch.float64)


def test_a_gradient_is_refused():
    latents, grids, noise, times, _ = make([(2, 3)], 2, 4)
    with pytest.raises(ValueError, match="one of them requires a gradient"):
        flow_mix(latents.requires_grad_(True), grids, noise, times, 2, torch.float32)


@compiled
def test_pytorch_accepts_the_operator():
    *arguments, _ = make([(2, 3), (0, 4), (1, 1)], 2, 4)
    torch.library.opcheck(torch.ops.megabagel.flow_mix, (*arguments, 2, torch.bfloat16))
