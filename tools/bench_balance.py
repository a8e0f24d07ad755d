"""Fill and evenness of packs, and what order they cost: BAGEL's greedy order, best fit and balanced packing.

    python tools/bench_balance.py --samples 60000

The mix is text to image, edits and conversations; costs are those of BAGEL-7B-MoT, all of it trained. Every rank of
`random` packs a stream of its own in BAGEL's order, as the official trainer does; the other strategies pack one stream
for all ranks. Work of a rank is the sum over its packs of a step. The last line is JSON.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

import numpy as np  # noqa: E402
from packs.mix import VLM, draw_sample  # noqa: E402

from megabagel.config.schema import DataConfig, ModelConfig  # noqa: E402
from megabagel.packing import native  # noqa: E402
from megabagel.packing.balance import balance, fill_limit  # noqa: E402
from megabagel.packing.binpack import PackLimits, pack_sequence  # noqa: E402
from megabagel.training.cost_model import cost_model  # noqa: E402

DATA = DataConfig()
LIMITS = PackLimits(
    DATA.expected_num_tokens,
    DATA.max_num_tokens,
    DATA.max_num_tokens_per_sample,
    DATA.prefer_buffer_before,
    DATA.max_buffer_size,
)
RANKS, PACKS_PER_RANK = (8, 64), (1, 4)


@dataclass
class Stream:
    """Samples in the order of their draws, int64 [samples] each."""

    tokens: np.ndarray
    costs: np.ndarray
    groups: np.ndarray

    def part(self, number: int, of: int) -> "Stream":
        return Stream(self.tokens[number::of], self.costs[number::of], self.groups[number::of])


def draw_stream(number: int, model: ModelConfig) -> Stream:
    draw, costs = random.Random(2), cost_model(model)
    drawn = [draw_sample(draw, i) for i in range(number)]
    values = [(sample.num_tokens, costs.cost(sample), group) for group, sample in drawn]
    return Stream(*np.array(values, dtype=np.int64).T)


def packs_of(stream: Stream, strategy: str, limits: PackLimits, mandatory: tuple[int, ...]) -> list[list[int]]:
    """Full packs in order; the last ones, which take what is left of a stream that ends, are dropped."""
    pack_of = pack_sequence(strategy, limits, stream.tokens.tolist(), stream.groups.tolist(), mandatory)
    packs: list[list[int]] = [[] for _ in range(max(pack_of) + 1)]
    for sample, pack in enumerate(pack_of):
        packs[pack].append(sample)
    return packs[: -1 - limits.max_buffer_size // 4]


def balanced_steps(
    stream: Stream, packs: list[list[int]], per_step: int, mandatory: tuple[int, ...]
) -> tuple[list[list[int]], list[float]]:
    """The packs of whole steps after balancing, and seconds of processor time per step."""
    done, spent = [], []
    for first in range(0, len(packs) - per_step + 1, per_step):
        step = packs[first : first + per_step]
        samples = [sample for pack in step for sample in pack]
        number_of = {sample: number for number, sample in enumerate(samples)}
        columns = [values[samples].tolist() for values in (stream.tokens, stream.costs, stream.groups)]
        start = time.process_time()
        result = balance(
            [[number_of[s] for s in pack] for pack in step], *columns, mandatory=mandatory, max_num_tokens=most()
        )
        spent.append(time.process_time() - start)
        done += [[samples[i] for i in pack] for pack in result]
    return done, spent


def most() -> int:
    return LIMITS.max_num_tokens


def fill(stream: Stream, packs: list[list[int]]) -> float:
    return sum(int(stream.tokens[pack].sum()) for pack in packs) / (len(packs) * most())


def costs_of(stream: Stream, packs: list[list[int]]) -> np.ndarray:
    return np.array([stream.costs[pack].sum() for pack in packs], dtype=np.float64)


def by_rank(costs: np.ndarray, ranks: int, per_rank: int) -> np.ndarray:
    """Work of each rank in each step, [steps, ranks]: packs are dealt in their order, forth and back."""
    steps = len(costs) // (ranks * per_rank)
    dealt = costs[: steps * ranks * per_rank].reshape(steps, per_rank, ranks).copy()
    dealt[:, 1::2] = dealt[:, 1::2, ::-1]
    return dealt.sum(axis=1)


def imbalance(work: np.ndarray) -> tuple[float, float]:
    """Largest over mean work of the ranks: mean and largest over the steps. Raises ValueError without a whole step."""
    if not len(work):
        raise ValueError("there are too few samples for a step of all ranks; raise --samples")
    ratio = work.max(axis=1) / work.mean(axis=1)
    return float(ratio.mean()), float(ratio.max())


def random_work(stream: Stream, ranks: int, per_rank: int, mandatory: tuple[int, ...]) -> np.ndarray:
    """Work of ranks that pack streams of their own, [steps, ranks]."""
    streams = [stream.part(rank, ranks) for rank in range(ranks)]
    costs = [costs_of(part, packs_of(part, "greedy", LIMITS, mandatory)) for part in streams]
    steps = min(map(len, costs)) // per_rank
    return np.array([c[: steps * per_rank].reshape(steps, per_rank).sum(axis=1) for c in costs]).T


def displacement(packs: list[list[int]], stream: Stream, per_step: int = 1) -> dict[str, list[float]]:
    """How far samples move from their draw: median, 99% and largest distance.

    In samples: between the place in the order of the draws and that in the order of the packs. In packs and steps: from
    those that would hold the sample were packs cut from the draws in order.
    """
    placed = np.array([sample for pack in packs for sample in pack])
    pack_of = np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])
    draws = np.sort(placed)
    before = stream.tokens[draws].cumsum() - stream.tokens[draws]
    in_order = (before * len(packs) // stream.tokens[draws].sum())[np.searchsorted(draws, placed)]
    moved = {
        "samples": np.abs(np.arange(len(placed)) - np.searchsorted(draws, placed)),
        "packs": np.abs(pack_of - in_order),
        "steps": np.abs(pack_of // per_step - in_order // per_step),
    }
    return {unit: [float(np.quantile(m, q)) for q in (0.5, 0.99, 1.0)] for unit, m in moved.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=60_000, help="samples of the stream")
    parser.add_argument("--freeze-und", action="store_true", help="train only what generates pictures")
    parser.add_argument("--mandatory", action="store_true", help="every pack holds a conversation")
    options = parser.parse_args()
    if native.PLANNER is None:
        raise SystemExit("packing so many samples needs the C++ planner: build it with 'python csrc/build.py'")
    model = replace(ModelConfig(), freeze_und=options.freeze_und, freeze_vit=options.freeze_und)
    mandatory = (VLM,) if options.mandatory else ()
    stream = draw_stream(options.samples, model)
    limit = fill_limit(LIMITS.max_num_tokens, LIMITS.max_num_tokens_per_sample)
    lower = replace(LIMITS, max_num_tokens=limit, expected_num_tokens=min(limit, LIMITS.expected_num_tokens))
    packs = {
        "greedy": packs_of(stream, "greedy", LIMITS, mandatory),
        "best fit": packs_of(stream, "best_fit", LIMITS, mandatory),
    }
    unbalanced = packs_of(stream, "best_fit", lower, mandatory)

    ratios: dict[str, float] = {}
    print(f"{options.samples} samples, {len(unbalanced)} packs; a sample waits for at most {LIMITS.max_buffer_size}")
    for name, value in [*((n, fill(stream, p)) for n, p in packs.items()), ("balanced", fill(stream, unbalanced))]:
        ratios[f"fill, {name}"] = round(value, 4)
        print(f"  fill of {name:9} {value:.4f} of {most()} tokens")
    print("largest / mean work of the ranks, mean over steps (largest of a step):")
    for ranks in RANKS:
        for per_rank in PACKS_PER_RANK:
            balanced, spent = balanced_steps(stream, unbalanced, ranks * per_rank, mandatory)
            work = {"random": random_work(stream, ranks, per_rank, mandatory)}
            work |= {name: by_rank(costs_of(stream, p), ranks, per_rank) for name, p in packs.items()}
            work["balanced"] = by_rank(costs_of(stream, balanced), ranks, per_rank)
            line = []
            for name, of_ranks in work.items():
                mean, worst = imbalance(of_ranks)
                ratios[f"imbalance, {name}, {ranks} ranks, {per_rank} packs"] = round(worst, 4)
                line.append(f"{name} {mean:.4f} ({worst:.4f})")
            moved = displacement(balanced, stream, ranks * per_rank)
            print(f"  {ranks} ranks, {per_rank} packs each: {', '.join(line)}")
            print(f"    balancing a step: {1e3 * np.mean(spent):.1f} ms; moved (median, 99%, largest): {text(moved)}")
    for name, of_strategy in packs.items():
        print(f"  {name} in steps of 8 packs moves {text(displacement(of_strategy, stream, 8))}")
    units = {name: "largest / mean, worst step" if "imb" in name else "tokens / capacity" for name in ratios}
    print(json.dumps({"bench": "balance", "ratios": ratios, "units": units}))


def text(moved: dict[str, list[float]]) -> str:
    return "; ".join(f"{', '.join(f'{v:.0f}' for v in values)} {unit}" for unit, values in moved.items())


if __name__ == "__main__":
    main()
