"""Attention of packed sequences on the CPU against a dense mask per sample, from 1 k to 32 k tokens.

    python tools/bench_attention.py
    python tools/bench_attention.py --threads 1 --clock cpu    # on a machine that others use too

Forward and backward of one layer's core attention. Packs are text-to-image, editing and picture chats with pictures of
about 400 tokens (`mix`), short texts alone (`texts`) or one long text (`long`, a quarter of the tokens). Both ways give
the same values, which is checked first. Memory is the peak of a process of its own, less the inputs. Time and memory
follow the visible pairs and the tokens where the columns beside them stay level. The last line is JSON.
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
from baseline.gather_scatter import dense_attention, dense_masks  # noqa: E402
from baseline.memory import peak_memory  # noqa: E402
from baseline.mix import GEOMETRY, mixed_plan  # noqa: E402
from torch import Tensor  # noqa: E402

from megabagel.models.attention import prepare_attention  # noqa: E402
from megabagel.packing.plan import PackPlan  # noqa: E402
from megabagel.packing.planner import build_plan  # noqa: E402
from megabagel.packing.sample import Item, Sample  # noqa: E402
from megabagel.packing.splits import plan_sample  # noqa: E402

CPU = torch.device("cpu")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Work = Callable[[], tuple[Tensor, ...]]


def texts_plan(lengths: list[int]) -> PackPlan:
    """Texts of `lengths` tokens, each a sample."""
    samples = [Sample([Item("text", text_ids=[5] * (n - 2))], (0, i, 0), "texts", "") for i, n in enumerate(lengths)]
    return build_plan([plan_sample(sample, GEOMETRY, seed=0) for sample in samples], GEOMETRY, tile=16)


PACKS = {
    "mix": lambda tokens: mixed_plan(tokens, area=400),
    "texts": lambda tokens: texts_plan([40, 90, 25, 140, 60, 200, 85] * (tokens // 640)),
    "long": lambda tokens: texts_plan([tokens // 4]),
}


def prepare(arguments: argparse.Namespace, pack: str, tokens: int) -> tuple[dict[str, Work], int, int]:
    """Both ways to compute outputs and gradients, the visible pairs and the tokens of the pack."""
    plan = PACKS[pack](tokens)
    rows = plan.sequence_length
    draw = torch.Generator().manual_seed(0)
    shapes = [(rows, heads, arguments.head_dim) for heads in (arguments.heads, *2 * (arguments.kv_heads,))]
    qkv = [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]
    grad = torch.randn(shapes[0], generator=draw)

    def in_order(index: Tensor) -> list[Tensor]:
        return [x.detach()[index].requires_grad_() for x in qkv]

    def work(attend: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> Work:
        def run() -> tuple[Tensor, ...]:
            out = attend(*inputs)
            return out, *torch.autograd.grad(out, inputs, grad)

        return run

    ways = {}
    if arguments.memory_of in (None, "blocks"):
        ours = prepare_attention(plan.problems, rows, "sdpa", CPU)
        ways["blocks"] = work(ours, in_order(plan.attention_index), grad[plan.attention_index])
    if arguments.memory_of in (None, "dense"):
        ways["dense"] = work(dense_attention(dense_masks(plan)), qkv, grad)
    if arguments.memory_of is None:
        for a, b in zip(ways["blocks"](), ways["dense"](), strict=True):
            torch.testing.assert_close(a, b[plan.attention_index], atol=1e-4, rtol=1e-4)
    _, length, _, prefix_length, causal = plan.problems.unbind(1)
    own = torch.where(causal == 1, length * (length + 1) // 2, length * length)
    return ways, int((prefix_length * length + own).sum()), rows


def memory_alone(pack: str, tokens: int, way: str) -> float:
    """Peak MiB of one way in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--packs", pack, "--sizes", str(tokens), "--memory-of", way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(arguments: argparse.Namespace, pack: str, tokens: int) -> dict[str, float]:
    """Prints a line; medians of time and memory, relative to pairs and tokens."""
    clock = CLOCKS[arguments.clock]
    ways, pairs, rows = prepare(arguments, pack, tokens)
    seconds = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        for name, run in ways.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    middle = {name: median(times) for name, times in seconds.items()}
    memory = {name: memory_alone(pack, tokens, name) for name in ways}
    shown = (f"{n} {middle[n] * 1e3:.1f} ms ({min(t) * 1e3:.1f} to {max(t) * 1e3:.1f})" for n, t in seconds.items())
    per_pair, per_token = middle["blocks"] / pairs * 1e9, memory["blocks"] * 1024 / rows
    print(
        f"{pack:5} {rows:6} tokens, {pairs:10} pairs: {', '.join(shown)}; blocks {per_pair:.2f} ns per pair, "
        f"{per_token:.1f} KiB per token; memory {memory['blocks']:.0f} and {memory['dense']:.0f} MiB",
        flush=True,
    )
    return {
        "pairs": pairs,
        "per pair": per_pair,
        "per token": per_token,
        "speed-up": middle["dense"] / middle["blocks"],
        "memory": memory["blocks"] / memory["dense"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", nargs="+", choices=PACKS, default=list(PACKS), help="kinds of packs (all)")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384, 32768], help="tokens")
    for name, default, help_text in (
        ("heads", 8, "query heads"),
        ("kv-heads", 2, "key and value heads"),
        ("head-dim", 64, "width of a head"),
        ("repeats", 5, "timed runs of each, alternating"),
        ("threads", 2, "CPU threads"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{help_text} ({default})")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="elapsed time, or that of the process (wall)")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        ways, _, _ = prepare(arguments, arguments.packs[0], arguments.sizes[0])
        print(peak_memory(ways[arguments.memory_of]))
        return
    ratios = {}
    for pack in arguments.packs:
        found = [measure(arguments, pack, tokens) for tokens in arguments.sizes]
        first, last = found[0], found[-1]
        ratios |= {
            f"{pack}: speed-up over dense masks, largest size": last["speed-up"],
            f"{pack}: memory against dense masks, largest size": last["memory"],
            f"{pack}: pairs, largest over smallest size": last["pairs"] / first["pairs"],
            f"{pack}: time per pair, largest over smallest size": last["per pair"] / first["per pair"],
            f"{pack}: memory per token, largest over smallest size": last["per token"] / first["per token"],
        }
    ratios = {name: round(value, 3) for name, value in ratios.items()}
    print(json.dumps({"bench": "attention", "ratios": ratios, "units": dict.fromkeys(ratios, "ratio")}))


if __name__ == "__main__":
    main()
