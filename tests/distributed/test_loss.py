"""The vocabulary loss does not depend on which rank holds which classes and rows."""

from pathlib import Path

from tests.distributed.launch import launch_ok

PROGRAM = Path(__file__).with_name("loss_program.py")


def test_loss_and_gradients_of_sharded_classes_and_rows_are_those_of_whole_ones():
    assert "losses ok on (1, 2, 4) ranks" in launch_ok(PROGRAM, processes=4, timeout=120)
