"""What this machine can run of `config.kernels`: Transformer Engine or megatron-core's own linears, which FP8 recipe.

Asked once, at the start, on the device. Which class each part of a layer then is, `linears.py` says.
"""

import functools
import importlib
import importlib.util
import logging
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from megabagel.config.errors import ConfigError
from megabagel.config.precision import RECIPES
from megabagel.config.schema import Config, KernelConfig

Implementation = Literal["transformer_engine", "local"]  # as TransformerConfig.transformer_impl

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Capability:
    """`lacking`: why Transformer Engine cannot run here, None if it can. No CUDA device: `compute` is None."""

    lacking: str | None
    compute: tuple[int, int] | None
    cuda: tuple[int, int] | None


@functools.cache
def probe() -> Capability:
    """This process's device and installation."""
    if not torch.cuda.is_available():
        return Capability("there is no CUDA device", None, None)
    cuda = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    return Capability(_lacking(), torch.cuda.get_device_capability(), cuda)


def _lacking() -> str | None:
    if importlib.util.find_spec("transformer_engine") is None:
        return "it is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:
        return f"it is installed but cannot be imported ({str(error).splitlines()[0]})"
    return None


def choose(config: Config, capability: Capability) -> Implementation:
    """What `kernels.transformer_impl` comes to on a machine of this capability, which `require` has found sufficient.

    Transformer Engine multiplies float32 in TF32 (its cublaslt_gemm.cu): `auto` takes it for bf16 parameters only.
    """
    if config.kernels.transformer_impl != "auto":
        return config.kernels.transformer_impl
    suits = capability.lacking is None and config.training.params_dtype == "bf16"
    return "transformer_engine" if suits else "local"


def require(kernels: KernelConfig, capability: Capability) -> None:
    """Raise ConfigError when this machine cannot run what `kernels` asks for."""
    asked = None
    if kernels.transformer_impl == "transformer_engine":
        asked = "kernels.transformer_impl is transformer_engine"
    if kernels.fp8 is not None:
        asked = f"kernels.fp8 is {kernels.fp8}"
    if asked and capability.lacking:
        raise ConfigError(
            f"{asked}, but Transformer Engine cannot run here: {capability.lacking}; on a machine with a CUDA device "
            f"install it with `{_install(capability)}`, or set kernels.transformer_impl to auto and kernels.fp8 to "
            f"null."
        )
    if kernels.fp8 is not None:
        _require_recipe(kernels.fp8_recipe, capability)


def _require_recipe(name: str, capability: Capability) -> None:
    compute, cuda, recipe = capability.compute, capability.cuda, RECIPES[name]
    if recipe.runs_on(compute, cuda):
        return
    below = f" and below {_version(recipe.compute_below)}" if recipe.compute_below else ""
    with_cuda = f" and CUDA {_version(recipe.cuda)}" if recipe.cuda else ""
    fitting = ", ".join(other for other, each in RECIPES.items() if each.runs_on(compute, cuda))
    raise ConfigError(
        f"kernels.fp8_recipe {name} needs compute capability {_version(recipe.compute)} or higher{below}{with_cuda}, "
        f"but this device has {_version(compute)} and CUDA {_version(cuda)}; "
        f"{f'allowed are {fitting}' if fitting else 'set kernels.fp8 to null'}."
    )


def _version(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


def announce(kernels: KernelConfig, capability: Capability) -> None:
    """Say once, on rank 0, when `auto` falls back to megatron-core's own linears, and what that costs."""
    if kernels.transformer_impl == "auto" and capability.lacking and dist.get_rank() == 0:
        _say_once(_fallback(capability))


def _fallback(capability: Capability) -> str:
    cost = f"slower, norms apart from linears, no FP8. Install it with: {_install(capability)}"
    if capability.compute is None:
        cost = "no FP8, and nothing else is lost on a CPU."
    return f"Transformer Engine cannot run ({capability.lacking}), layers use megatron-core's own linears: {cost}"


def _install(capability: Capability) -> str:
    """The command for the releases that megatron-core 0.16 knows, built for torch's CUDA (12 by default)."""
    major = capability.cuda[0] if capability.cuda else 12
    return f'pip install --no-build-isolation "transformer_engine[pytorch,core_cu{major}]>=2.9,<2.12"'


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)
