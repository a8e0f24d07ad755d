"""Latents and ViT features are the same on all stages that need them, whoever computed them."""

from pathlib import Path

from tests.distributed.launch import launch_ok

PROGRAM = Path(__file__).with_name("encode_program.py")


def test_latents_features_and_vit_gradients_are_those_of_a_rank_that_works_alone():
    assert "encoding ok in 9 layouts" in launch_ok(PROGRAM, processes=4, timeout=300)
