"""The training loop and its parts: schedules, the encode phase, optimizer, moving average, metrics."""

from megabagel.runtime import cpu_megatron

cpu_megatron.install()
