"""Where a run takes its tokenizer and autoencoder from: an explicit setting wins over the BAGEL folder."""

from megabagel.config.folder import side_folder
from megabagel.config.schema import Config


def tokenizer_path(config: Config) -> str | None:
    """Folder of the tokenizer files; None when the configuration names none."""
    return config.data.tokenizer or _initial(config) or config.checkpoint.init_llm


def autoencoder_path(config: Config) -> str | None:
    """Folder or file of the autoencoder; None when the configuration names none."""
    return config.checkpoint.init_vae or _initial(config)


def _initial(config: Config) -> str | None:
    """The folder with what belongs to the initial weights."""
    return side_folder(config.checkpoint.init_from) if config.checkpoint.init_from else None
