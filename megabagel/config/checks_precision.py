"""Rules about Transformer Engine and FP8 that need no device: a run may be planned on a machine without one.

What the device and the installation must offer is checked at the start, in `models/precision.py`.
"""

from collections.abc import Iterator

from megabagel.config.precision import RECIPES
from megabagel.config.schema import Config


def precision_faults(config: Config) -> Iterator[str]:
    """Faults in order of importance."""
    yield from (_without_fp8(config) if config.kernels.fp8 is None else _fp8(config))


def _without_fp8(config: Config) -> Iterator[str]:
    kernels = config.kernels
    for name in ("fp8_param_gather", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if value := getattr(kernels, name):
            shown = str(value).lower()
            yield f"kernels.{name} is {shown}, but kernels.fp8 is null; set fp8 to hybrid or e4m3, or leave it out."


def _fp8(config: Config) -> Iterator[str]:
    kernels, training = config.kernels, config.training
    recipe = RECIPES[kernels.fp8_recipe]
    if kernels.transformer_impl == "local":
        yield (
            f"kernels.fp8 {kernels.fp8} needs Transformer Engine, but kernels.transformer_impl is local; set that to "
            f"auto or transformer_engine, or fp8 to null."
        )
    if training.params_dtype != "bf16":
        yield (
            f"kernels.fp8 {kernels.fp8} needs bf16 parameters, but training.params_dtype is {training.params_dtype}; "
            f"set it to bf16, or fp8 to null."
        )
    if training.recompute_granularity == "selective" and "layernorm" in training.recompute_modules:
        yield (
            "training.recompute_modules names layernorm, which saves nothing with kernels.fp8: there the linear after "
            "a norm keeps an FP8 copy of its input; allowed are core_attn and mlp."
        )
    if kernels.fp8_param_gather and not recipe.gathers_parameters:
        allowed = ", ".join(name for name, other in RECIPES.items() if other.gathers_parameters)
        yield (
            f"kernels.fp8_param_gather does not work with kernels.fp8_recipe {kernels.fp8_recipe}; allowed are "
            f"{allowed}."
        )
    yield from _bf16_layers(config)
    yield from _shapes(config)


def _bf16_layers(config: Config) -> Iterator[str]:
    """megatron-core: only within the first and the last pipeline stage."""
    kernels, layers = config.kernels, config.model.num_layers
    counts = {
        "num_layers_at_start_in_bf16": kernels.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": kernels.num_layers_at_end_in_bf16,
    }
    given = [f"kernels.{name} {count}" for name, count in counts.items() if count]
    if given and not RECIPES[kernels.fp8_recipe].bf16_layers:
        allowed = ", ".join(name for name, recipe in RECIPES.items() if recipe.bf16_layers)
        yield (
            f"{given[0]} does not work with kernels.fp8_recipe {kernels.fp8_recipe}, whose scales come from all layers "
            f"together; allowed are {allowed}."
        )
    if sum(counts.values()) >= layers:
        yield (
            f"{' and '.join(given)} {'leave' if len(given) > 1 else 'leaves'} none of model.num_layers {layers} in "
            f"FP8; lower the number, or set kernels.fp8 to null."
        )
    pp = config.parallel.pipeline_model_parallel_size
    for name, count in counts.items():
        if count > layers // pp:
            yield (
                f"kernels.{name} {count} is more than the {layers // pp} layers of a pipeline stage (model.num_layers "
                f"{layers} / pipeline_model_parallel_size {pp}); allowed are 0 to {layers // pp}."
            )


def _shapes(config: Config) -> Iterator[str]:
    alignment = RECIPES[config.kernels.fp8_recipe].alignment
    for name, width in _widths(config).items():
        if width % alignment:
            yield (
                f"{name} makes matrices {width} wide on a rank, but kernels.fp8_recipe {config.kernels.fp8_recipe} "
                f"multiplies multiples of {alignment}; change the shape or the layout, or set kernels.fp8 to null."
            )


def _widths(config: Config) -> dict[str, int]:
    """Widths of a layer's matrices on one tensor-parallel rank, by the setting that makes them."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    head = model.hidden_size // model.num_attention_heads
    heads, groups = model.num_attention_heads, model.num_query_groups
    split = f" / parallel.tensor_model_parallel_size {tp}" if tp > 1 else ""
    widths = {
        f"model.hidden_size {model.hidden_size}": model.hidden_size,
        f"model.num_attention_heads {heads}{split}": heads * head // tp,
        f"model.num_attention_heads {heads} with num_query_groups {groups}{split}": (heads + 2 * groups) * head // tp,
    }
    experts = (model.und_num_experts, model.gen_num_experts)
    if not all(experts):
        # modality experts are whole on their rank
        whole = config.parallel.expert_model_parallel_size > 1 and not model.has_sparse_experts
        cut, shown = (1, "") if whole else (tp, split)
        widths[f"model.ffn_hidden_size {model.ffn_hidden_size}{shown}"] = model.ffn_hidden_size // cut
    if model.has_sparse_experts:
        if model.moe_ffn_hidden_size is None:
            widths[f"model.ffn_hidden_size {model.ffn_hidden_size}"] = model.ffn_hidden_size
        else:
            widths[f"model.moe_ffn_hidden_size {model.moe_ffn_hidden_size}"] = model.moe_ffn_hidden_size
        if (shared := model.moe_shared_expert_intermediate_size) is not None:
            widths[f"model.moe_shared_expert_intermediate_size {shared}{split}"] = shared // tp
    return widths
