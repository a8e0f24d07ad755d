"""Rules about attention kernels: which can compute with the shapes and the precision of the model.

Whether a machine has them is found out when a run starts, not here.
"""

from collections.abc import Iterator

from megabagel.config.schema import Config


def attention_faults(config: Config) -> Iterator[str]:
    """Faults of `kernels.attention_backend`; auto and sdpa have none."""
    model, backend = config.model, config.kernels.attention_backend
    head_dim = model.hidden_size // model.num_attention_heads
    width = f"attention heads are {head_dim} wide (model.hidden_size / num_attention_heads)"
    if backend == "varlen":
        if config.training.params_dtype != "bf16":
            yield (
                f"kernels.attention_backend varlen computes in bf16, but training.params_dtype is "
                f"{config.training.params_dtype}; set bf16, or the backend to auto, sdpa or flex."
            )
        if head_dim % 8 or head_dim > 256:
            yield (
                f"{width}, but kernels.attention_backend varlen takes multiples of 8 up to 256; change the width or "
                f"set sdpa or flex."
            )
    if backend == "flex" and head_dim < 16:
        yield f"{width}, but kernels.attention_backend flex takes 16 or more; change the width or set auto or sdpa."
