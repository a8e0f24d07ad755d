"""Keys and shapes of a model's weights in a checkpoint of ours, asked of the model itself; nothing is allocated.

For writing checkpoints without a run. What the keys are called in a BAGEL folder is `released.py`'s matter.
"""

from megabagel.config.schema import Config, KernelConfig, ModelConfig, ParallelConfig, TrainingConfig

from megabagel.runtime import distributed  # isort: skip  megatron-core is adapted before it is imported

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

from megabagel.models.build import build_stages


def own_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the whole tensor, layers stacked along its first dimension, as any run of `model` saves it.

    Starts a process group of this process alone for as long as it takes, where none of one process is there.
    """
    alone = not parallel_state.model_parallel_is_initialized()
    if alone:
        distributed.initialize(ParallelConfig(), 0)
    try:
        # what linears it is made of changes no key
        config = Config(model, training=TrainingConfig(params_dtype="bf16"), kernels=KernelConfig("local"))
        (stage,) = build_stages(config, torch.device("meta"))
        wanted = load_preprocess(stage.sharded_state_dict())[0]
    finally:
        if alone:
            distributed.destroy()
    return {t.key: tuple(t.global_shape) for t in nested_values(wanted) if isinstance(t, ShardedTensor)}
