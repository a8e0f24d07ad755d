"""What tools/replay_step.py is made of."""
