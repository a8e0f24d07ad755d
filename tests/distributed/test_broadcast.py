"""One reader serves all ranks of its replica; one launch for all checks."""

from pathlib import Path

from tests.distributed.launch import launch_ok


def test_every_rank_of_a_replica_gets_packs_states_errors_and_the_pixels_of_its_own_pictures(tmp_path):
    output = launch_ok(Path(__file__).with_name("broadcast_program.py"), tmp_path, processes=3)
    assert output.count("broadcast is fine") == 3
