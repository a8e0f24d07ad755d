"""From the configuration to this rank's model stages: megatron-core's config, the modules, what is frozen.

Weights are left uninitialised; `checkpoint/hf.py` fills them, also when training from scratch.
"""

import re

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megabagel.config.pipeline_split import megatron_layout, split_layers
from megabagel.config.precision import RECIPES
from megabagel.config.schema import Config, KernelConfig, ModelConfig, TrainingConfig
from megabagel.models import precision
from megabagel.models.bagel import Bagel
from megabagel.models.specs import und_expert_ranks
from megabagel.runtime.expert_groups import share_experts

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
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        # batched sends and receives give wrong gradients in the interleaved schedule
        overlap_p2p_comm=parallel.virtual_pipeline_model_parallel_size is not None,
        batch_p2p_comm=parallel.virtual_pipeline_model_parallel_size is None,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        **_pipeline_layout(config),
        **_recompute(config.training),
        transformer_impl=precision.choose(config, precision.probe()),
        **_fp8(config.kernels),
        deterministic_mode=config.training.deterministic,
        calculate_per_token_loss=True,  # losses are global: sum gradients over data-parallel ranks
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        # gloo has no stream order between a send and the release of its buffer
        deallocate_pipeline_outputs=torch.cuda.is_available(),
    )


def _pipeline_layout(config: Config) -> dict:
    """The layers of each stage where they are counted out; otherwise megatron-core divides them evenly."""
    parallel = config.parallel
    if parallel.pipeline_split == "even" or parallel.pipeline_model_parallel_size == 1:
        return {}
    stages = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    return {"pipeline_model_parallel_layout": megatron_layout(split_layers(config.model, config.data, stages))}


def _recompute(training: TrainingConfig) -> dict:
    """megatron-core wants the settings of the other granularity to be absent."""
    granularity = training.recompute_granularity
    if granularity == "selective":
        return {"recompute_granularity": granularity, "recompute_modules": list(training.recompute_modules)}
    if granularity == "full":
        return {
            "recompute_granularity": granularity,
            "recompute_method": training.recompute_method,
            "recompute_num_layers": training.recompute_num_layers,
        }
    return {}


def _fp8(kernels: KernelConfig) -> dict:
    """megatron-core's TransformerBlock enters the FP8 context of these settings around its layers."""
    if kernels.fp8 is None:
        return {}
    start, end = kernels.num_layers_at_start_in_bf16, kernels.num_layers_at_end_in_bf16
    return {
        "fp8": kernels.fp8,
        "fp8_recipe": RECIPES[kernels.fp8_recipe].megatron_name,
        "fp8_param": kernels.fp8_param_gather,
        "first_last_layers_bf16": start + end > 0,
        "num_layers_at_start_in_bf16": start,
        "num_layers_at_end_in_bf16": end,
        # delayed scaling: Transformer Engine's defaults; megatron-core's look one step back
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
    }


def freeze(stage: Bagel, model: ModelConfig) -> None:
    """Turn off gradients of what the configuration freezes, before optimizer and DDP see the parameters."""
    for name, parameter in stage.named_parameters():
        is_vit = name.startswith("vision.")
        is_llm = name.startswith("decoder.") or any(part in name for part in ("word_embeddings", "_norm.", "lm_head"))
        frozen_und = model.freeze_und and not _TRAINABLE_UNDER_FREEZE_UND.search(name)
        if (model.freeze_vit and is_vit) or (model.freeze_llm and is_llm and not is_vit) or frozen_und:
            parameter.requires_grad_(False)


def build_stages(config: Config, device: torch.device) -> list[Bagel]:
    """This rank's stages on `device`, weights uninitialised, frozen parameters marked; several when interleaved.

    Raises ConfigError when the device or the installation cannot run what `config.kernels` asks for.
    """
    precision.require(config.kernels, precision.probe())
    precision.announce(config.kernels, precision.probe())
    if (und_ranks := und_expert_ranks(config.model, config.parallel)) is not None:
        share_experts(und_ranks)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    settings = transformer_config(config)
    stages = []
    for vp_stage in [None] if virtual is None else range(virtual):
        with torch.device(device):
            stage = Bagel(settings, config, groups, vp_stage)
        # tables are computed, on whatever device was current; parameters are already where they belong
        stage.to(device)
        freeze(stage, config.model)
        stages.append(stage)
    return stages
