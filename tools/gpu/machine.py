"""What the machine has: GPU, compilers, libraries, and which of megabagel's operators are compiled for it."""

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_LIBRARIES = {
    "megatron-core": "megatron.core",
    "triton": "triton",
    "transformer-engine": "transformer_engine",
    "flash-attn": "flash_attn",
}


def _version(package: str, module: str) -> str | None:
    try:
        if importlib.util.find_spec(module) is None:
            return None
        return version(package)
    except ModuleNotFoundError:  # of the package around the module
        return None
    except PackageNotFoundError:  # built in place: there, but without a record
        return "unknown version"


def describe() -> dict:
    """`gpu` is None without one."""
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "count": torch.cuda.device_count(),
        }
    return {
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "libraries": {package: _version(package, module) for package, module in _LIBRARIES.items()},
    }


def own_architecture() -> str:
    """Compute capability of the GPU as MEGABAGEL_CUDA_ARCHS takes it; "" without one."""
    return "{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""
