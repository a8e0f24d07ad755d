"""Checkpoints of runs, and BAGEL folders in and out."""
