"""The BAGEL network on megatron-core: streams, joint attention, vision tower, latents and heads."""
