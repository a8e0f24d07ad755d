"""The loss of the vocabulary head, forward and backward: rows taken and loss computed in chunks against full logits.

    python tools/bench_loss.py
    python tools/bench_loss.py --rows 16384 --chunk-rows 2048 --hidden 64 --without plain
    python tools/bench_loss.py --device cuda --dtype bf16 --rows 16384 --chunk-rows 2048 --hidden 3584

"full" projects all rows at once and computes the loss as megatron-core does: float32 logits that become the softmax and
then the gradient in place. "plain" is torch.nn.functional.cross_entropy of float32 logits. All give the same loss and
gradients, which is checked first. Memory is the peak above weights and inputs, on the CPU of a process of its own. The
floor is what the three matrix products take alone. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

import torch  # noqa: E402
from baseline.memory import peak_memory  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import cross_entropy, linear  # noqa: E402

from megabagel.models.vocabulary_head import vocabulary_loss  # noqa: E402
from megabagel.ops.loss_rows import loss_row_gather  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class FullCrossEntropy(torch.autograd.Function):
    """Of float32 logits [n, classes], which it overwrites: first with the softmax, then with the gradient."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        logits -= logits.max(dim=-1, keepdim=True)[0]
        picked = logits[torch.arange(len(labels), device=labels.device), labels]
        torch.exp(logits, out=logits)
        total = logits.sum(dim=-1)
        loss = torch.log(total) - picked
        logits.div_(total[:, None])
        ctx.save_for_backward(logits, labels)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        softmax, labels = ctx.saved_tensors
        softmax[torch.arange(len(labels), device=labels.device), labels] -= 1
        return softmax.mul_(grad[:, None]), None


class Case:
    """A stream of which half the rows carry a loss, the head, and the ways to train it."""

    def __init__(self, arguments: argparse.Namespace):
        draw = torch.Generator().manual_seed(0)
        n, place = arguments.rows, {"dtype": DTYPES[arguments.dtype], "device": arguments.device}
        self.stream = torch.randn(2 * n, arguments.hidden, generator=draw).to(**place).requires_grad_()
        weight = torch.randn(arguments.classes, arguments.hidden, generator=draw) * 0.02
        self.weight = weight.to(**place).requires_grad_()
        self.rows = torch.randperm(2 * n, generator=draw)[:n].sort()[0].to(arguments.device)
        self.labels = torch.randint(arguments.classes, (n,), generator=draw).to(arguments.device)
        self.row_weights = torch.full((n,), 1 / n, device=arguments.device)
        self.chunk_rows = arguments.chunk_rows
        self.ways: dict[str, Callable[[], Tensor]] = {"chunked": self.chunked, "full": self.full, "plain": self.plain}
        self.ways = {name: way for name, way in self.ways.items() if name not in arguments.without}

    def chunked(self) -> Tensor:
        hidden = loss_row_gather(self.stream, self.rows)
        return vocabulary_loss(hidden, self.weight, self.labels, self.row_weights, None, self.chunk_rows)[0]

    def full(self) -> Tensor:
        logits = linear(self.stream[self.rows], self.weight).float()
        return (FullCrossEntropy.apply(logits, self.labels) * self.row_weights).sum()

    def plain(self) -> Tensor:
        logits = linear(self.stream[self.rows], self.weight).float()
        return (cross_entropy(logits, self.labels, reduction="none") * self.row_weights).sum()

    def step(self, name: str) -> Tensor:
        self.stream.grad = self.weight.grad = None
        loss = self.ways[name]()
        loss.backward()
        return loss.detach()

    def products(self) -> None:
        """The three matrix products of a step, in chunks."""
        with torch.no_grad():
            total = torch.zeros_like(self.weight)
            for hidden in self.stream[: len(self.rows)].split(self.chunk_rows):
                logits = hidden @ self.weight.t()
                logits @ self.weight
                total.addmm_(logits.t(), hidden)

    def memory(self, name: str) -> float:
        """MiB that a step adds at its peak."""
        if self.stream.is_cuda:
            self.stream.grad = self.weight.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step(name)
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        return peak_memory(lambda: self.step(name))


def differences(case: Case) -> dict[str, float]:
    """Largest relative difference of loss and gradients from those of the first way."""
    found = {}
    for name in case.ways:
        values = [case.step(name), case.stream.grad, case.weight.grad]
        if not found:
            expected = values
        found[name] = max(float((a - b).norm() / b.norm()) for a, b in zip(values, expected, strict=True))
    return found


def seconds(case: Case, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if case.stream.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory_of_all(case: Case, options: list[str]) -> dict[str, float]:
    """MiB by way; on the CPU each in a process of its own, for freed memory may stay with a process."""
    if case.stream.is_cuda:
        return {name: case.memory(name) for name in case.ways}
    commands = {name: [sys.executable, __file__, *options, "--memory-of", name] for name in case.ways}
    return {n: float(subprocess.run(c, check=True, stdout=subprocess.PIPE).stdout) for n, c in commands.items()}


def parse(options: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, help_text in (
        ("rows", 2048, "loss rows"),
        ("classes", 152064, "vocabulary"),
        ("hidden", 256, "hidden size"),
        ("chunk-rows", 256, "rows whose logits exist at once"),
        ("repeats", 5, "timed steps of each, alternating"),
        ("threads", 2, "CPU threads"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{help_text} ({default})")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of hidden rows and weight")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--without", nargs="*", choices=["full", "plain"], default=[], help="ways to leave out")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args(options)


def main() -> None:
    options = sys.argv[1:]
    arguments = parse(options)
    torch.set_num_threads(arguments.threads)
    case = Case(arguments)
    if arguments.memory_of:
        print(case.memory(arguments.memory_of))
        return
    for name, difference in differences(case).items():
        print(f"{name}: loss and gradients within {difference:.1e} of the chunked ones")
    case.stream.grad = case.weight.grad = None
    times = {name: [] for name in (*case.ways, "products")}
    for _ in range(arguments.repeats):
        for name in case.ways:
            times[name].append(seconds(case, lambda way=name: case.step(way)))
        times["products"].append(seconds(case, case.products))
    middle = {name: median(values) for name, values in times.items()}
    del case.stream.grad, case.weight.grad
    memory = memory_of_all(case, options)
    for name, values in times.items():
        used = f", {memory[name]:.0f} MiB" if name in memory else " (the matrix products alone)"
        print(f"{name}: median {middle[name]:.2f} s ({min(values):.2f} to {max(values):.2f}){used}")
    ratios = {"matrix products alone against chunked, time": middle["products"] / middle["chunked"]}
    for name in [name for name in case.ways if name != "chunked"]:
        ratios[f"chunked against {name}, time"] = middle["chunked"] / middle[name]
        ratios[f"chunked against {name}, peak memory"] = memory["chunked"] / memory[name]
    units = dict.fromkeys(ratios, "ratio")
    print(json.dumps({"bench": "loss", "ratios": {k: round(v, 3) for k, v in ratios.items()}, "units": units}))


if __name__ == "__main__":
    main()
