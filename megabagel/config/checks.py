"""Every rule that a configuration must obey before a run may start, one sentence each.

Rules about numbers and their combinations are here, those about the layout over ranks in `checks_parallel.py`, about
experts in `checks_experts.py`, about attention in `checks_attention.py`, about FP8 in `checks_precision.py`, about
samples in `checks_samples.py` and about files (weights, tokenizer, data) in `checks_files.py`.
No rule imports torch: a wrong configuration is found before any memory is taken.
"""

from collections.abc import Iterator

from megabagel.config.checks_attention import attention_faults
from megabagel.config.checks_experts import expert_faults
from megabagel.config.checks_faults import faults_faults
from megabagel.config.checks_files import file_faults
from megabagel.config.checks_logging import logging_faults
from megabagel.config.checks_parallel import layout_faults, world_faults
from megabagel.config.checks_precision import precision_faults
from megabagel.config.checks_samples import samples_faults
from megabagel.config.checks_validation import validation_faults
from megabagel.config.errors import ConfigError
from megabagel.config.schema import Config

__all__ = ["ConfigError", "check_config", "check_layout", "check_model"]

_CONNECTOR_ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "relu", "silu")


def check_config(config: Config, world_size: int) -> None:
    """Raise ConfigError with the first fault of `config` on `world_size` processes; return when there is none."""
    check_model(config)
    for faults in (_budgets, _optimizer, validation_faults, faults_faults):
        _refuse(faults(config))
    _refuse(world_faults(config, world_size))
    _refuse(file_faults(config))
    _refuse(samples_faults(config))
    _refuse(logging_faults(config))


def check_layout(config: Config, world_size: int) -> None:
    """The rules about the model, its layout and the batch, for programs that read no data. Raises ConfigError."""
    check_model(config)
    _refuse(world_faults(config, world_size))


def check_model(config: Config) -> None:
    """The rules about the model and its layout that hold on any number of processes. Raises ConfigError."""
    for faults in (_ranges, _model, _freezing, expert_faults, layout_faults, attention_faults, precision_faults):
        _refuse(faults(config))


def _refuse(faults: Iterator[str]) -> None:
    for fault in faults:
        raise ConfigError(fault)


def _ranges(config: Config) -> Iterator[str]:
    """Single values out of range."""
    model, data, training = config.model, config.data, config.training
    positive = {
        "model": (model, "hidden_size num_layers num_attention_heads num_query_groups ffn_hidden_size vocab_size "
                  "rotary_base layernorm_epsilon latent_patch_size max_latent_size timestep_shift init_std "
                  "und_num_experts gen_num_experts moe_router_topk moe_ffn_hidden_size "
                  "moe_shared_expert_intermediate_size"),
        "model.vit": (model.vit, "hidden_size num_layers num_attention_heads ffn_hidden_size patch_size "
                      "max_num_patch_per_side layernorm_epsilon"),
        "model.vae": (model.vae, "resolution in_channels downsample ch out_ch num_res_blocks z_channels scale_factor "
                      "num_groups"),
        "parallel": (config.parallel, "tensor_model_parallel_size pipeline_model_parallel_size "
                     "virtual_pipeline_model_parallel_size num_layers_in_first_pipeline_stage "
                     "num_layers_in_last_pipeline_stage context_parallel_size expert_model_parallel_size "
                     "und_expert_ranks"),
        "data": (data, "expected_num_tokens max_num_tokens max_num_tokens_per_sample prefetch_mib max_image_pixels"),
        "optimizer": (config.optimizer, "lr adam_eps"),
        "training": (training, "train_steps global_batch_size recompute_num_layers"),
        "checkpoint": (config.checkpoint, "keep_last keep_every keep_best local_save_interval"),
        "faults": (config.faults, "nonfinite_patience spike_window spike_threshold hang_seconds time_limit_margin"),
        "logging": (config.logging, "log_interval"),
    }  # fmt: skip
    for group, (values, names) in positive.items():
        for name in names.split():
            if (value := getattr(values, name)) is not None and not value > 0:
                yield f"{group}.{name} is {value}, but must be greater than 0."
    not_negative = {
        "model": (model, "moe_aux_loss_coeff moe_z_loss_coeff"),
        "data": (data, "prefer_buffer_before max_buffer_size num_workers seed"),
        "optimizer": (config.optimizer, "min_lr lr_warmup_steps weight_decay clip_grad"),
        "training": (training, "ce_weight mse_weight seed"),
        "kernels": (config.kernels, "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16"),
        "checkpoint": (config.checkpoint, "save_interval"),
        "faults": (config.faults, "max_rollbacks max_restarts_without_progress"),
        "logging": (config.logging, "straggler_interval"),
    }
    for group, (values, names) in not_negative.items():
        for name in names.split():
            if (value := getattr(values, name)) is not None and not value >= 0:
                yield f"{group}.{name} is {value}, but must not be negative."
    for name in ("text_cond_dropout_prob", "vit_cond_dropout_prob", "vae_cond_dropout_prob"):
        if not 0 <= (value := getattr(data, name)) <= 1:
            yield f"data.{name} is {value}, but a probability lies in 0 .. 1."
    for name in ("adam_beta1", "adam_beta2", "ema_decay"):
        value = getattr(config.optimizer, name)
        if value is not None and not 0 <= value < 1:
            yield f"optimizer.{name} is {value}, but must lie in 0 .. 1, 1 excluded."
    if not config.logging.straggler_factor > 1:
        yield f"logging.straggler_factor is {config.logging.straggler_factor}, but must be greater than 1."
    if config.logging.peak_tflops is not None and not config.logging.peak_tflops > 0:
        yield f"logging.peak_tflops is {config.logging.peak_tflops}, but must be greater than 0; null turns MFU off."


def _model(config: Config) -> Iterator[str]:
    """Shapes that do not fit together."""
    model, vit, vae = config.model, config.model.vit, config.model.vae
    if model.hidden_size % model.num_attention_heads:
        yield (
            f"model.hidden_size {model.hidden_size} does not divide into model.num_attention_heads "
            f"{model.num_attention_heads}; make it a multiple."
        )
    if (head_dim := model.hidden_size // model.num_attention_heads) % 2:
        yield f"attention heads are {head_dim} wide (hidden_size / num_attention_heads), but RoPE needs an even width."
    if model.num_attention_heads % model.num_query_groups:
        yield (
            f"model.num_attention_heads {model.num_attention_heads} does not divide into model.num_query_groups "
            f"{model.num_query_groups}; every group serves the same number of heads."
        )
    if model.hidden_size % 4:
        yield (
            f"model.hidden_size {model.hidden_size} is not divisible by 4, which the two-dimensional sine-cosine "
            f"position tables need."
        )
    if vit.hidden_size % vit.num_attention_heads:
        yield (
            f"model.vit.hidden_size {vit.hidden_size} does not divide into model.vit.num_attention_heads "
            f"{vit.num_attention_heads}; make it a multiple."
        )
    if model.connector_act not in _CONNECTOR_ACTIVATIONS:
        yield (
            f"model.connector_act `{model.connector_act}` is unknown; allowed are {', '.join(_CONNECTOR_ACTIVATIONS)}."
        )
    if vae.downsample != (by_levels := 2 ** (len(vae.ch_mult) - 1)):
        yield (
            f"model.vae.downsample is {vae.downsample}, but model.vae.ch_mult {list(vae.ch_mult)} halves the picture "
            f"to 1/{by_levels}; set downsample to {by_levels}."
        )
    for width in sorted({vae.ch * multiple for multiple in (1, *vae.ch_mult)}):
        if width % vae.num_groups:
            yield (
                f"model.vae has layers of {width} channels, which do not divide into model.vae.num_groups "
                f"{vae.num_groups}."
            )


def _freezing(config: Config) -> Iterator[str]:
    """Nothing left to train."""
    model = config.model
    if model.freeze_und and not model.visual_gen:
        yield (
            "model.freeze_und trains only what generates pictures, but model.visual_gen is false; set visual_gen to "
            "true or freeze_und to false."
        )
    if model.freeze_und and model.tie_word_embeddings:
        yield (
            "model.freeze_und trains the vocabulary head and freezes the embedding, but model.tie_word_embeddings "
            "makes them one tensor; set one of the two to false."
        )
    if model.freeze_llm and not model.visual_und and not model.visual_gen:
        yield (
            "model.freeze_llm with visual_und and visual_gen both false leaves nothing to train; set one of them to "
            "true or freeze_llm to false."
        )
    if config.training.ce_weight == 0 and config.training.mse_weight == 0:
        yield "training.ce_weight and training.mse_weight are both 0, so nothing would be learnt; raise one of them."
    if config.training.ce_weight == 0 and not model.visual_gen:
        yield "training.ce_weight is 0 and model.visual_gen is false, so no loss is left; raise ce_weight."


def _budgets(config: Config) -> Iterator[str]:
    """Token budgets that contradict each other."""
    data = config.data
    if data.expected_num_tokens > data.max_num_tokens:
        yield (
            f"data.expected_num_tokens {data.expected_num_tokens} is more than data.max_num_tokens "
            f"{data.max_num_tokens}; a pack is closed at the first and never passes the second."
        )
    if data.max_num_tokens_per_sample > data.max_num_tokens:
        yield (
            f"data.max_num_tokens_per_sample {data.max_num_tokens_per_sample} is more than data.max_num_tokens "
            f"{data.max_num_tokens}; a sample must fit into a pack."
        )


def _optimizer(config: Config) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr {optimizer.min_lr} is above optimizer.lr {optimizer.lr}; lower it."
    if optimizer.lr_decay_steps is not None and optimizer.lr_decay_steps <= optimizer.lr_warmup_steps:
        yield (
            f"optimizer.lr_decay_steps {optimizer.lr_decay_steps} must be more than optimizer.lr_warmup_steps "
            f"{optimizer.lr_warmup_steps}: it counts from the start, warm-up included."
        )
