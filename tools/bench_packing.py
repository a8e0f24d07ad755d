"""Time, memory and fill of packing: the C++ planner against its Python reference and a packer made of lists.

    python tools/bench_packing.py --runs 15

A plan is made of 36,864 tokens of text to image, edits and conversations; the three take turns in one process and their
tables are compared first. The list packer does not make the attention plan. The last line is JSON.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

import torch  # noqa: E402
from packs import list_packer  # noqa: E402
from packs.mix import GEOMETRY, VLM, draw_pack, draw_sample  # noqa: E402

from megabagel.packing import native, reference  # noqa: E402
from megabagel.packing.binpack import PackLimits, efficiency, pack_sequence  # noqa: E402
from megabagel.packing.plan import PackPlan  # noqa: E402
from megabagel.packing.planner import build_plan  # noqa: E402

TILE = 16
LIMITS = PackLimits(32768, 36864, 16384, 16384, 50)  # of the presets


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(plan: PackPlan, other: dict[str, torch.Tensor]) -> None:
    """Raises RuntimeError, naming the first table that differs."""
    for name, table in other.items():
        if not torch.allclose(getattr(plan, name), table, rtol=1e-6, atol=0):
            raise RuntimeError(f"the baseline's {name} differs from the plan's; the comparison would mean nothing")


def bench_time(tokens: int, runs: int) -> tuple[dict[str, list[float]], int]:
    """Seconds per plan of each way, turn by turn."""
    samples = draw_pack(0, tokens)
    ways = {
        "native": lambda: build_plan(samples, GEOMETRY, TILE),
        "lists": lambda: list_packer.pack(samples, GEOMETRY),
        "reference": lambda: reference.build_plan(samples, GEOMETRY, TILE),
    }
    compare(ways["native"](), ways["lists"]())
    compare(ways["native"](), {k: v for k, v in vars(ways["reference"]()).items() if isinstance(v, torch.Tensor)})
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, work in ways.items():
            times[name].append(seconds(work))
    return times, sum(len(sample.pieces) for sample in samples)


def bench_memory(tokens: int, sizes: tuple[int, ...]) -> list[tuple[int, float, float]]:
    """Tokens, bytes of the plan per token, and milliseconds."""
    one, rows = draw_pack(1, tokens), []
    for times in sizes:
        spent = [seconds(lambda times=times: build_plan(one * times, GEOMETRY, TILE)) for _ in range(3)]
        plan = build_plan(one * times, GEOMETRY, TILE)
        size = sum(value.nbytes for value in vars(plan).values() if isinstance(value, torch.Tensor))
        rows.append((plan.sequence_length, size / plan.sequence_length, 1e3 * median(spent)))
    return rows


def bench_fill(number: int) -> dict[str, tuple[float, float]]:
    """Tokens over the capacity of the packs for a sequence of `number` samples, and microseconds per sample."""
    draw = random.Random(2)
    drawn = [draw_sample(draw, i) for i in range(number)]
    groups, lengths = [group for group, _ in drawn], [sample.num_tokens for _, sample in drawn]
    most = LIMITS.max_num_tokens

    def fill(strategy: str, limits: PackLimits, mandatory: tuple[int, ...] = ()) -> tuple[float, float]:
        start = time.perf_counter()
        pack_of = pack_sequence(strategy, limits, lengths, groups, mandatory)
        spent = time.perf_counter() - start
        return efficiency(lengths, pack_of, most), 1e6 * spent / number

    return {
        "greedy": fill("greedy", LIMITS),
        "greedy, closed only when full": fill("greedy", replace(LIMITS, expected_num_tokens=most)),
        "best fit": fill("best_fit", LIMITS),
        "best fit, 10 waiting": fill("best_fit", replace(LIMITS, max_buffer_size=10)),
        "greedy, conversations mandatory": fill("greedy", LIMITS, (VLM,)),
        "best fit, conversations mandatory": fill("best_fit", LIMITS, (VLM,)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="plans of each way to take the median of")
    parser.add_argument("--tokens", type=int, default=36_864, help="tokens of a pack")
    parser.add_argument("--copies", default="1,8,28", help="the pack repeated this often, for memory")
    parser.add_argument("--samples", type=int, default=5000, help="samples of the sequence that is packed")
    options = parser.parse_args()
    if native.PLANNER is None:
        raise SystemExit("there is nothing to measure without the C++ planner: build it with 'python csrc/build.py'")

    times, pieces = bench_time(options.tokens, options.runs)
    print(f"one plan of {options.tokens} tokens in {pieces} pieces, {options.runs} runs:")
    for name, values in times.items():
        spread = f"{1e3 * min(values):.3f} .. {1e3 * max(values):.3f}"
        print(f"  {name:10} {1e3 * median(values):8.3f} ms ({spread})")
    ratios, units = {}, {}
    for name in ("reference", "lists"):
        each = [slow / fast for slow, fast in zip(times[name], times["native"], strict=True)]
        ratios[f"{name} / native"] = round(median(each), 2)
        units[f"{name} / native"] = "times as long, median of the runs"
        print(f"  {name} takes {median(each):.1f} times as long ({min(each):.1f} .. {max(each):.1f})")

    rows = bench_memory(options.tokens, tuple(map(int, options.copies.split(","))))
    for length, size, milliseconds in rows:
        print(f"  {length:9} tokens: {size:6.2f} bytes of plan per token, {milliseconds:.2f} ms")
    ratios["bytes per token, largest / smallest"] = round(rows[-1][1] / rows[0][1], 4)
    units["bytes per token, largest / smallest"] = "1 is linear"

    print(f"tokens over capacity of the packs, {options.samples} samples:")
    for name, (value, spent) in bench_fill(options.samples).items():
        print(f"  {name:34} {value:.4f}, {spent:6.1f} us to choose a sample")
        ratios[name], units[name] = round(value, 4), "tokens / (packs * max_num_tokens)"
    print(f"milliseconds per plan: {1e3 * median(times['native']):.3f}")
    print(json.dumps({"bench": "packing", "ratios": ratios, "units": units}))


if __name__ == "__main__":
    main()
