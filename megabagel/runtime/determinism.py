"""Makes a run repeatable to the bit: the same settings, data, layout and machines give the same numbers.

It tells libraries to; what has no repeatable form raises an error that names the operator when it is first used.
"""

import os

import torch

from megabagel.config.errors import ConfigError

_WORKSPACES = (":4096:8", ":16:8")


def make_deterministic() -> None:
    """To be called before the first use of a GPU. Raises ConfigError when the environment forbids it.

    Sums are then always taken in one order: by cuBLAS with a workspace of its own, by NCCL without the switches' own
    arithmetic (NVLS), by Transformer Engine and torch with kernels that use no atomic additions.
    """
    if os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACES[0]) not in _WORKSPACES:
        raise ConfigError(
            f"training.deterministic needs the environment variable CUBLAS_WORKSPACE_CONFIG to be one of "
            f"{', '.join(_WORKSPACES)}, not {os.environ['CUBLAS_WORKSPACE_CONFIG']}; unset it."
        )
    algorithms = os.environ.setdefault("NCCL_ALGO", "Ring")
    if ("NVLS" in algorithms) != algorithms.startswith("^"):  # named, or not excluded
        raise ConfigError(
            f"training.deterministic excludes NCCL's algorithm NVLS, which the environment variable NCCL_ALGO "
            f"({algorithms}) allows; unset it, or set it to Ring, Tree or ^NVLS."
        )
    if os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0") != "0":
        raise ConfigError(
            "training.deterministic needs the environment variable NVTE_ALLOW_NONDETERMINISTIC_ALGO to be 0; unset it."
        )
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
