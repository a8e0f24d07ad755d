"""The training loop and its parts: schedules, the encode phase, optimizer, moving average, metrics."""
