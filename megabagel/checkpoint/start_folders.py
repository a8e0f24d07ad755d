"""The folders that a model starts from before it is BAGEL: Qwen2.5, SigLIP and the FLUX autoencoder, as on the Hub.

Which shape follows from their configurations, and which files belong beside the weights. `sources.Pretrained` maps the
tensors.
"""

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megabagel.checkpoint.bagel_folder import BagelFolder
from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.sources import Pretrained, Scratch
from megabagel.config.folder import AUTOENCODER_PARAMS, read_autoencoder_config, read_model_config
from megabagel.config.schema import ModelConfig, TrainingConfig
from megabagel.config.write_folder import write_model_config

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class StartFolders:
    """`vae`: a folder with ae.safetensors, or the file.

    Without `vit` the model sees no pictures, without `vae` it makes none.
    """

    llm: Path
    vit: Path | None = None
    vae: Path | None = None
    variant: str = "mot"

    def model(self) -> ModelConfig:
        """Raises ConfigError or CheckpointError where a configuration is missing."""
        base = ModelConfig(layer_variant=self.variant)
        llm = _read(self.llm)
        if "rope_theta" not in llm:
            llm["rope_theta"] = (llm.get("rope_parameters") or {}).get("rope_theta", base.rotary_base)
        llm.pop("tie_word_embeddings", None)  # BAGEL's head is its own
        vit = {} if self.vit is None else _read(self.vit)
        vit = vit.get("vision_config", vit) or _as_file(base)
        top = {}
        if "image_size" in vit and "patch_size" in vit:
            top["vit_max_num_patch_per_side"] = vit["image_size"] // vit["patch_size"]
        with tempfile.TemporaryDirectory() as folder:
            for name, content in {"llm_config": llm, "vit_config": vit, "config": top}.items():
                (Path(folder) / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
            model = read_model_config(folder, base)
        return dataclasses.replace(
            model,
            visual_und=self.vit is not None,
            visual_gen=self.vae is not None,
            vae=(self.vae and read_autoencoder_config(self._autoencoder_file().parent)) or base.vae,
        )

    def _autoencoder_file(self) -> Path:
        file = self.vae / "ae.safetensors" if self.vae.is_dir() else self.vae
        if not file.is_file():
            raise CheckpointError(f"there is no autoencoder at {self.vae}; give ae.safetensors or its folder (--vae)")
        return file

    def source(self, model: ModelConfig) -> Pretrained:
        """What no folder has is drawn as a run with default settings draws it."""
        vit = BagelFolder(self.vit, ("model",)) if self.vit else None
        return Pretrained(BagelFolder(self.llm, ("model",)), vit, Scratch(TrainingConfig().seed, model.init_std))

    def side_files(self) -> dict[str, Path]:
        """Tokenizer and autoencoder: name in a BAGEL folder -> file."""
        found = {name: self.llm / name for name in _TOKENIZER_FILES}
        if self.vae is not None:
            file = self._autoencoder_file()
            found |= {"ae.safetensors": file, AUTOENCODER_PARAMS: file.parent / AUTOENCODER_PARAMS}
        return {name: path for name, path in found.items() if path.is_file()}

    def write_config(self, target: Path, model: ModelConfig) -> None:
        """The configurations of a BAGEL folder."""
        write_model_config(target, model, "bfloat16")


def _read(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} has no config.json that can be read ({error}); give a folder of the Hub"
        ) from None


def _as_file(model: ModelConfig) -> dict:
    """The default ViT's shape, which a model without a ViT states and does not use."""
    vit = model.vit
    return {
        "hidden_size": vit.hidden_size,
        "num_attention_heads": vit.num_attention_heads,
        "intermediate_size": vit.ffn_hidden_size,
        "patch_size": vit.patch_size,
        "num_hidden_layers": vit.num_layers + 1,
    }
