"""The JSON files of a BAGEL folder from a model's shape: the way back from `folder.read_model_config`.

Only what describes the model. Tokenizer files and weights are others' business.
"""

import dataclasses
import json
from pathlib import Path

from megabagel.config.folder import AUTOENCODER_PARAMS, LAYER_VARIANTS, LLM_KEYS, LLM_OPTIONAL_KEYS, TOP_KEYS, VIT_KEYS
from megabagel.config.schema import ModelConfig


def write_model_config(folder: Path, model: ModelConfig, dtype: str) -> None:
    """Write config.json, llm_config.json, vit_config.json and ae_params.json; `dtype` as Hugging Face names it."""
    layer_module = next(name for name, variant in LAYER_VARIANTS.items() if variant == model.layer_variant)
    llm = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "torch_dtype": dtype,
        **{key: getattr(model, field) for field, key in (LLM_KEYS | LLM_OPTIONAL_KEYS).items()},
    }
    vit = {
        "model_type": "siglip_vision_model",
        "image_size": model.vit.patch_size * model.vit.max_num_patch_per_side,
        "layer_norm_eps": model.vit.layernorm_epsilon,
        "num_hidden_layers": model.vit.num_layers + 1,  # the released file counts the last layer, which is not used
        **{key: getattr(model.vit, field) for field, key in VIT_KEYS.items()},
    }
    top = {
        "architectures": ["BagelForConditionalGeneration"],
        "model_type": "bagel",
        "torch_dtype": dtype,
        "max_latent_size": model.max_latent_size,
        "vit_max_num_patch_per_side": model.vit.max_num_patch_per_side,
        **{key: getattr(model, key) for key in TOP_KEYS},
        "llm_config": llm | {"layer_module": layer_module},
        "vit_config": vit,
        "vae_config": {"downsample": model.vae.downsample, "z_channels": model.vae.z_channels},
    }
    for name, content in {
        "config.json": top,
        "llm_config.json": llm,
        "vit_config.json": vit,
        AUTOENCODER_PARAMS: dataclasses.asdict(model.vae),
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
