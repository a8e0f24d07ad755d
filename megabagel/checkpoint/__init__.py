"""Checkpoints of runs, and BAGEL folders in and out."""

from megabagel.runtime import cpu_megatron

cpu_megatron.install()
