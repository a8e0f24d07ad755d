"""The core attention of packed sequences, by one of several backends that agree to rounding.

Knows problems (rows of `PackPlan.problems`) and tensors; nothing of modalities, projections or parallelism.
"""

from megabagel.models.attention.choice import AttentionPlan, choose_backend, prepare_attention

__all__ = ["AttentionPlan", "choose_backend", "prepare_attention"]
