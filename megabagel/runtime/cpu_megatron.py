"""The one adapter of megatron-core to CPU and gloo: `install()` does what `ROWS` says, where there is no CUDA device.

It changes where megatron-core computes, never what it computes. It is no place for our own features, nor for GPU fixes.
"""

import contextlib
import functools
import importlib
import importlib.machinery
import logging
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

import torch

PACKAGE = "megatron.core"
SUPPORTED = (0, 16)


@dataclass(frozen=True)
class Row:
    """One place that is replaced: `module` and the dotted `name` in it, the reason, and old object -> new object."""

    module: str
    name: str
    why: str
    replace: Callable[[Any], Any]


# ----------------------------------------------------------------------------------- the stand-in for `torch`
class _Stream:
    """A CUDA stream or event where everything is done at once: every wait is already over."""

    def _nothing(self, *args: Any, **kwargs: Any) -> "_Stream":
        return self

    record_event = record = synchronize = wait_event = wait_stream = wait = _nothing


class _Nvtx:
    """Profiler ranges of CUDA tools: nothing to mark."""

    @staticmethod
    def range_push(message: str) -> None: ...

    @staticmethod
    def range_pop() -> None: ...


class _Cuda:
    """What megatron-core asks of `torch.cuda`, answered for the CPU; everything else is torch's own answer."""

    nvtx = _Nvtx

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device: Any) -> None: ...

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def Stream(self, *args: Any, **kwargs: Any) -> _Stream:
        return _Stream()

    Event = current_stream = default_stream = Stream

    def stream(self, stream: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


def _on_cpu(factory: Callable) -> Callable:
    """The tensor factory with device="cuda..." read as the CPU, and no pinned memory."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


class _TorchOnCpu(ModuleType):
    """Stands for the name `torch` inside megatron-core's modules."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_torch_on_cpu = _TorchOnCpu("torch")
_torch_on_cpu.cuda = _Cuda()
for _name in ("tensor", "zeros", "ones", "full", "arange", "empty", "zeros_like", "ones_like", "empty_like"):
    setattr(_torch_on_cpu, _name, _on_cpu(getattr(torch, _name)))


# ------------------------------------------------------------------------------------------------ replacements
def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _no_fusion(function: Callable | None = None, **options: Any) -> Callable:
    return (lambda f: f) if function is None else function


def _to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _clip(parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False) -> None:
    coefficient = max_norm / (total_norm + 1.0e-6)
    if coefficient < 1.0:
        for parameter in [parameters] if torch.is_tensor(parameters) else parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(coefficient)


def _with_cuda_type_names(init: Callable) -> Callable:
    """`init`, during which `Tensor.type()` says torch.cuda.FloatTensor for torch.FloatTensor."""

    @functools.wraps(init)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        original = torch.Tensor.type

        def type_(tensor: torch.Tensor, *a: Any, **k: Any) -> Any:
            answer = original(tensor, *a, **k)
            return answer.replace("torch.", "torch.cuda.") if isinstance(answer, str) else answer

        torch.Tensor.type = type_
        try:
            return init(*args, **kwargs)
        finally:
            torch.Tensor.type = original

    return wrapped


ROWS = (
    Row(
        "megatron.core.jit",
        "jit_fuser",
        "it is torch.compile, which on a CPU needs a C++ compiler and minutes; compiled functions are unwrapped",
        lambda old: _no_fusion,
    ),
    Row(
        "megatron.core.tensor_parallel.random",
        "_get_cuda_rng_state",
        "reads torch's CUDA generators through names imported from torch.cuda",
        lambda old: _get_rng_state,
    ),
    Row(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        "queues the new state until CUDA starts, which never happens",
        lambda old: _set_rng_state,
    ),
    Row(
        "megatron.core.transformer.moe.moe_utils",
        "maybe_move_tensor_to_cpu",
        "returns a CPU tensor as it is even where numpy was asked for (expert parallelism needs numpy)",
        lambda old: _to_cpu,
    ),
    Row(
        "megatron.core.optimizer.clip_grads",
        "clip_grad_by_total_norm_fp32",
        "asserts that gradients are torch.cuda.FloatTensor; same coefficient max_norm / (norm + 1e-6)",
        lambda old: _clip,
    ),
    Row(
        "megatron.core.optimizer.optimizer",
        "Float16OptimizerWithFloat16Params.__init__",
        "sorts parameters by the names of CUDA tensor types",
        _with_cuda_type_names,
    ),
    Row(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.__init__",
        "sorts parameters by the names of CUDA tensor types",
        _with_cuda_type_names,
    ),
)
# Two more, for every module of megatron-core: the global name `torch` is bound to a stand-in whose `cuda` answers for
# the CPU and whose factories take device="cuda" for the CPU; and `Tensor.cuda()` returns the tensor itself.


# ----------------------------------------------------------------------------------------------------- install
def install() -> None:
    """Adapt megatron-core to the CPU; does nothing where CUDA is available, and nothing when called again.

    Modules that are loaded already are adapted now, the others when they are imported.
    Raises RuntimeError when the installed megatron-core lacks a place that a row names.
    """
    if torch.cuda.is_available() or any(isinstance(finder, _AdaptOnImport) for finder in sys.meta_path):
        return
    # "CPU RNG state changed within GPU RNG context": here both are one generator, so it always does
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: not record.getMessage().startswith("CPU RNG state changed")
    )
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    sys.meta_path.insert(0, _AdaptOnImport())
    for module in _loaded():
        _adapt(module)


class _AdaptOnImport(MetaPathFinder):
    """Finds megatron-core's modules as usual and adapts each right after it has run."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not _is_megatron(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_adapt(module: ModuleType) -> None:
                run(module)
                _adapt(module)

            spec.loader.exec_module = run_and_adapt
        return spec


def _is_megatron(name: str) -> bool:
    return name == PACKAGE or name.startswith(PACKAGE + ".")


def _loaded() -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if _is_megatron(name) and module is not None]


def _adapt(module: ModuleType) -> None:
    if vars(module).get("torch") is torch:
        module.torch = _torch_on_cpu
    _unwrap_compiled(module)
    for row in ROWS:
        if row.module == module.__name__:
            _apply(row, module)


def _apply(row: Row, module: ModuleType) -> None:
    """Replace the row's object in its owner and under every name that loaded modules imported it by."""
    *path, last = row.name.split(".")
    owner: Any = module
    try:
        for part in path:
            owner = getattr(owner, part)
        old = getattr(owner, last)
    except AttributeError:
        raise RuntimeError(_unsupported(f"{row.module}.{row.name}")) from None
    new = row.replace(old)
    setattr(owner, last, new)
    for other in _loaded():
        for name in [name for name, value in vars(other).items() if value is old]:
            setattr(other, name, new)


def _unwrap_compiled(module: ModuleType) -> None:
    """Undo torch.compile where a module was loaded before `install()`: in the module and in the classes it defines."""
    classes = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    for owner in [module, *classes]:
        for name, value in list(vars(owner).items()):
            if isinstance(value, types.FunctionType) and "_torchdynamo_orig_callable" in vars(value):
                setattr(owner, name, value._torchdynamo_orig_callable)


def _unsupported(place: str) -> str:
    version = importlib.import_module("megatron.core.package_info").__version__
    wanted = ".".join(map(str, SUPPORTED))
    return (
        f"megatron-core {version} cannot run on the CPU here: it has no `{place}`, which "
        f"megabagel/runtime/cpu_megatron.py adapts; install megatron-core {wanted}.x or run on CUDA devices"
    )
