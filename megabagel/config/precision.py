"""The FP8 recipes: their names in megatron-core, what they ask of shapes and of the device.

Plain data, which needs no torch: checks of a configuration and of a device both read it.
"""

from dataclasses import dataclass

from megabagel.config.schema import KernelConfig

BF16_TILE = 16  # rows of a tile without FP8; also what most recipes need


@dataclass(frozen=True)
class Recipe:
    """One way to choose the scales of FP8 matrix products.

    `alignment` divides both sides of every matrix. `compute` is the lowest compute capability that has the products,
    `compute_below` the lowest that lacks them again, `cuda` the lowest CUDA version. From Transformer Engine 2.x, which
    checks the same when a run enters FP8.
    """

    megatron_name: str
    alignment: int
    compute: tuple[int, int]
    compute_below: tuple[int, int] | None = None
    cuda: tuple[int, int] | None = None
    gathers_parameters: bool = True  # megatron-core's distributed optimizer can gather parameters in this form
    bf16_layers: bool = True  # single layers can stay out of it

    def runs_on(self, compute: tuple[int, int], cuda: tuple[int, int]) -> bool:
        """Whether a device of this compute capability has the products, with this CUDA version."""
        above = self.compute_below is None or compute < self.compute_below
        return self.compute <= compute and above and (self.cuda is None or self.cuda <= cuda)


RECIPES = {
    # one scale per tensor, from the largest values of past steps: the whole block is one FP8 region
    "delayed": Recipe("delayed", 16, (8, 9), bf16_layers=False),
    # one scale per tensor, from its present values
    "current": Recipe("tensorwise", 16, (8, 9)),
    # one scale per 1 x 128 values of activations and 128 x 128 of weights
    "blockwise": Recipe("blockwise", 16, (9, 0), cuda=(12, 9)),
    # one power of two per 32 values
    "mxfp8": Recipe("mxfp8", 32, (10, 0), compute_below=(12, 0), gathers_parameters=False),
}


def rows_per_tile(kernels: KernelConfig) -> int:
    """What the number of rows of a stream is a multiple of, on every rank that shares them."""
    return BF16_TILE if kernels.fp8 is None else RECIPES[kernels.fp8_recipe].alignment
