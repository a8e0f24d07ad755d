"""From the configuration to this rank's model stage: megatron-core's config, the meta-free module, what is frozen.

Weights are left uninitialised; `checkpoint/hf.py` fills them, also when training from scratch.
"""

import re

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megabagel.config.schema import Config, ModelConfig
from megabagel.models.bagel import Bagel

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# parameters that stay trainable under freeze_und: the gen stream, the latent path and the vocabulary head
_TRAINABLE_UNDER_FREEZE_UND = re.compile(r"(^|\.)gen(_norm)?\.|llm2vae|lm_head")


def _leave_empty(weight: torch.Tensor) -> None:
    """megatron-core's init methods run for their side effects (marks on the weight); values come from a checkpoint."""


def transformer_config(config: Config) -> TransformerConfig:
    """megatron-core's view of the decoder and of the layout."""
    model, parallel = config.model, config.parallel
    dtype = DTYPES[config.training.params_dtype]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        qk_layernorm=model.qk_layernorm,
        add_bias_linear=False,
        add_qkv_bias=True,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_leave_empty,
        output_layer_init_method=_leave_empty,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        calculate_per_token_loss=True,  # losses are global: sum gradients over data-parallel ranks
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        # gloo has no stream order between a send and the release of its buffer
        deallocate_pipeline_outputs=torch.cuda.is_available(),
    )


def freeze(stage: Bagel, model: ModelConfig) -> None:
    """Turn off gradients of what the configuration freezes, before optimizer and DDP see the parameters."""
    for name, parameter in stage.named_parameters():
        is_vit = ".vit." in name
        is_llm = name.startswith("decoder.") or any(part in name for part in ("word_embeddings", "_norm.", "lm_head"))
        frozen_und = model.freeze_und and not _TRAINABLE_UNDER_FREEZE_UND.search(name)
        if (model.freeze_vit and is_vit) or (model.freeze_llm and is_llm and not is_vit) or frozen_und:
            parameter.requires_grad_(False)


def build_stage(config: Config, device: torch.device) -> Bagel:
    """This rank's stage on `device`, weights uninitialised, frozen parameters marked."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with torch.device(device):
        stage = Bagel(
            transformer_config(config),
            config.model,
            groups,
            parallel_state.is_pipeline_first_stage(),
            parallel_state.is_pipeline_last_stage(),
        )
    # tables are computed, on whatever device was current; parameters are already where they belong
    stage.to(device)
    freeze(stage, config.model)
    return stage
