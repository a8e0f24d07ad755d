"""The encode phase gives every stage the same latents and ViT features, whoever computed them."""

from pathlib import Path

import pytest

from tests.distributed.launch import launch_ok

PROGRAM = Path(__file__).with_name("encode_program.py")


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_latents_and_features_are_those_of_a_rank_that_works_alone(processes):
    assert "encoding ok" in launch_ok(PROGRAM, processes=processes, timeout=180)
