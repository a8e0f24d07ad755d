"""Reads the shape of a model from the JSON files of a BAGEL folder, as released on the Hub.

Files: `llm_config.json` and `vit_config.json` (needed), `config.json` and `ae_params.json` (used where present). No
weights are loaded; only the header of the weights file is read, for the sides of the position tables.
"""

import dataclasses
import json
import math
import struct
from pathlib import Path
from typing import Any

from megabagel.config.autoencoder import AutoencoderConfig
from megabagel.config.errors import ConfigError, unknown_key
from megabagel.config.schema import ModelConfig

WEIGHT_FILES = ("ema.safetensors", "model.safetensors")
LATENT_TABLE, VIT_TABLE = "latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"
AUTOENCODER_PARAMS = "ae_params.json"
CARRIED = "bagel"  # folder in a converted checkpoint: the BAGEL folder's files, of its weights the headers alone
HEADER_ALONE = ".header"  # ending of those
LAYER_VARIANTS = {"Qwen2MoTDecoderLayer": "mot", "Qwen2MoEDecoderLayer": "moe", "Qwen2DecoderLayer": "dense"}
LLM_KEYS = {  # ModelConfig field -> key of llm_config.json
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "rotary_base": "rope_theta",
    "layernorm_epsilon": "rms_norm_eps",
}
LLM_OPTIONAL_KEYS = {"qk_layernorm": "qk_norm", "tie_word_embeddings": "tie_word_embeddings"}
VIT_KEYS = {
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "patch_size": "patch_size",
}
SWITCHES = ("interpolate_pos", "timestep_shift", "visual_gen", "visual_und")  # change no tensor: a user may differ
TOP_KEYS = ("connector_act", "latent_patch_size", *SWITCHES)


def read_model_config(folder: str, base: ModelConfig) -> ModelConfig:
    """`base` with everything that `folder` says about the shape; what it does not say stays as in `base`.

    Raises:
        ConfigError: a missing or broken JSON file, a missing key, or an unknown kind of layer.
    """
    root = Path(side_folder(folder))
    if not root.is_dir():
        raise ConfigError(f"model.folder: there is no folder {folder}; give a BAGEL folder with llm_config.json.")
    llm, vit = _read(root / "llm_config.json"), _read(root / "vit_config.json")
    top = _read(root / "config.json", optional=True)
    values: dict[str, Any] = {field: _get(llm, key, root / "llm_config.json") for field, key in LLM_KEYS.items()}
    values |= {field: llm[key] for field, key in LLM_OPTIONAL_KEYS.items() if key in llm}
    values |= {key: top[key] for key in TOP_KEYS if key in top}
    values["layer_variant"] = _layer_variant(llm, top, root, base)
    sides = _table_sides(root)
    values["max_latent_size"] = sides.get(LATENT_TABLE, top.get("max_latent_size", base.max_latent_size))
    vit_values = {field: _get(vit, key, root / "vit_config.json") for field, key in VIT_KEYS.items()}
    # The released file counts one layer more than is used: BAGEL reads the output of the second to last.
    vit_values["num_layers"] = _get(vit, "num_hidden_layers", root / "vit_config.json") - 1
    vit_values["layernorm_epsilon"] = vit.get("layer_norm_eps", base.vit.layernorm_epsilon)
    vit_values["max_num_patch_per_side"] = sides.get(
        VIT_TABLE, top.get("vit_max_num_patch_per_side", base.vit.max_num_patch_per_side)
    )
    vae = read_autoencoder_config(root) or base.vae
    return dataclasses.replace(base, **values, vit=dataclasses.replace(base.vit, **vit_values), vae=vae)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a run folder or a checkpoint folder of ours rather than a BAGEL folder."""
    return any((path / name).is_file() for name in ("latest_checkpointed_iteration.txt", ".metadata"))


def side_folder(path: str) -> str:
    """Where configurations, tokenizer and autoencoder are that belong to the weights at `path`.

    `path` itself, unless it is a checkpoint that was made of a BAGEL folder, or a run folder that holds one: they carry
    these files.
    """
    root = Path(path)
    carried = (root / CARRIED, *sorted(root.glob(f"iter_*/{CARRIED}"), reverse=True))
    return next((str(folder) for folder in carried if folder.is_dir()), path)


def read_autoencoder_config(folder: Path) -> AutoencoderConfig | None:
    """The autoencoder's shape from `ae_params.json` in `folder`; None when there is no such file."""
    path = folder / AUTOENCODER_PARAMS
    if not path.is_file():
        return None
    params = _read(path)
    allowed = [f.name for f in dataclasses.fields(AutoencoderConfig)]
    for key in params:
        if key not in allowed:
            raise unknown_key(str(path), key, allowed)
    if "ch_mult" in params:
        params["ch_mult"] = tuple(params["ch_mult"])
    return AutoencoderConfig(**params)


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Name -> shape of all tensors of a safetensors file, from its header alone (format: length, JSON, data)."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length) if length < 1 << 30 else b"")
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        size = 8 + length + (0 if path.suffix == HEADER_ALONE else max(ends, default=0))
        if path.stat().st_size != size:
            raise ValueError("cut short")
        return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    except (OSError, struct.error, ValueError, AttributeError, KeyError, TypeError):
        raise ConfigError(f"{path} is not a readable safetensors file (truncated download?); fetch it again.") from None


def _table_sides(root: Path) -> dict[str, int]:
    """Side of each square position table that a weights file of `root` holds."""
    for name in (*WEIGHT_FILES, *(file + HEADER_ALONE for file in WEIGHT_FILES)):
        if (root / name).is_file():
            shapes = tensor_shapes(root / name)
            return {table: math.isqrt(shapes[table][0]) for table in (LATENT_TABLE, VIT_TABLE) if table in shapes}
    return {}


def _layer_variant(llm: dict, top: dict, root: Path, base: ModelConfig) -> str:
    """Kind of layer by its official class name; the released llm_config.json leaves it out, then `base` decides."""
    name = llm.get("layer_module") or top.get("llm_config", {}).get("layer_module")
    if name is None:
        return base.layer_variant
    if name not in LAYER_VARIANTS:
        raise ConfigError(f"{root}: layer_module `{name}` is unknown; known are {', '.join(LAYER_VARIANTS)}.")
    return LAYER_VARIANTS[name]


def _read(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); a BAGEL folder needs this file.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, found {type(content).__name__}.")
    return content


def _get(content: dict[str, Any], key: str, path: Path) -> Any:
    """The number under `key`."""
    if key not in content:
        raise ConfigError(f"{path}: key `{key}` is missing; a BAGEL folder states it.")
    if not isinstance(content[key], (int, float)):
        raise ConfigError(f"{path}: `{key}` must be a number, found {content[key]!r}.")
    return content[key]
