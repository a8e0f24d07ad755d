"""Turning packs into updates: encode, step, optimizer, moving average, metrics and the loop."""
