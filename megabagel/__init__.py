"""megabagel: Megatron-style training of unified multimodal models of the BAGEL family."""

__version__ = "0.1.0"
