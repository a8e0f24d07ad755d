"""Where a run takes its tokenizer and autoencoder from: an explicit setting wins over the BAGEL folder."""

from megabagel.config.schema import Config


def tokenizer_path(config: Config) -> str | None:
    """Folder of the tokenizer files; None when the configuration names none."""
    return config.data.tokenizer or config.checkpoint.init_from or config.checkpoint.init_llm


def autoencoder_path(config: Config) -> str | None:
    """Folder or file of the autoencoder; None when the configuration names none."""
    return config.checkpoint.init_vae or config.checkpoint.init_from
