"""The learning rate as a function of the step: linear warm-up, then constant, cosine or linear. Holds no state."""

import math

from megabagel.config.schema import OptimizerConfig


def lr_at(step: int, config: OptimizerConfig, train_steps: int) -> float:
    """Learning rate of the update number `step` (from 0).

    Warm-up of W steps: lr * step / W, so the first update of a run with warm-up has rate 0, as in the schedules of
    transformers that official BAGEL uses; W = 0 starts at the full rate. Cosine and linear then fall to `min_lr`, which
    is reached at step `lr_decay_steps` (null: `train_steps`) and kept.
    """
    warmup = config.lr_warmup_steps
    if step < warmup:
        return config.lr * step / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    decay_steps = train_steps if config.lr_decay_steps is None else config.lr_decay_steps
    progress = min(1.0, (step - warmup) / max(1, decay_steps - warmup))
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.lr_decay_style == "cosine" else 1.0 - progress
    return config.min_lr + (config.lr - config.min_lr) * remaining
