"""The BAGEL network on megatron-core: streams, joint attention, vision tower, latents and heads."""

from megabagel.runtime import cpu_megatron

cpu_megatron.install()
