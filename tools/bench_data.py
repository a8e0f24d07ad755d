"""Packed tokens per second of the reader, from files to packs, against a plain PyTorch pipeline on the same files.

    python tools/bench_data.py --rounds 3
    python tools/bench_data.py --latents      # the reader from stored moments, and from those and ViT features, too
    python tools/bench_data.py --memory       # resident memory over 100,000 samples

JPEGs with a long side of 512 to 1024 pixels, written once; the ways take turns with two workers each. Processor seconds
are counted too: they say what the ways need when other programs keep the cores busy. The last line is JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

import psutil  # noqa: E402
from baseline import official_pipeline  # noqa: E402
from baseline.bench_files import OFFICIAL, TINY, write_files  # noqa: E402
from baseline.stored_files import write_stored  # noqa: E402
from packs.mix import GEOMETRY  # noqa: E402

from megabagel.config.datasets import load_dataset_groups  # noqa: E402
from megabagel.config.schema import DataConfig  # noqa: E402
from megabagel.data.pack import Pack  # noqa: E402
from megabagel.data.reader import Reader  # noqa: E402
from megabagel.data.stored import StoredLatents  # noqa: E402
from megabagel.data.text import Tokenizer  # noqa: E402

TOKENIZER = ROOT / "tests" / "golden" / "public-basic" / "ckpt"
WARM = 4  # packs before the clock starts


@dataclass
class Rate:
    """What `tokens` packed tokens took: seconds on the clock, and of all processes' processor time."""

    tokens: int
    wall: float
    cpu: float

    def per_second(self) -> float:
        return self.tokens / self.wall


def family() -> list[psutil.Process]:
    """This process and all below it."""
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def cpu_seconds() -> float:
    return sum(sum(process.cpu_times()[:2]) for process in family())


def resident_mib() -> float:
    """Memory of all processes; what they share is counted once, by halves and thirds."""
    return sum(process.memory_full_info().pss for process in family()) / 2**20


def our_packs(file: Path, config: DataConfig) -> Iterator[Pack]:
    groups, tokenizer = load_dataset_groups(str(file)), Tokenizer(str(TOKENIZER))
    geometry = replace(GEOMETRY, special_tokens=tokenizer.special)
    known = [StoredLatents.open(group, features=True) for group in groups.values()]
    with Reader(config, groups, tokenizer, geometry, tile=16, global_batch_size=1, known=known) as reader:
        while True:
            yield from reader.next_step()


def our_tokens(file: Path, config: DataConfig, floats: bool = False) -> Iterator[int]:
    """Tokens of each pack. `floats`: pictures are also normalised, which the trainer does on its device."""
    for pack in our_packs(file, config):
        if floats:
            for image in (*pack.vae_images, *pack.vit_images):
                image.float().div_(127.5).sub_(1)
        yield int(pack.plan.sample_lens.sum())


def plain_tokens(file: Path, config: DataConfig) -> Iterator[int]:
    groups, tokenizer = load_dataset_groups(str(file)), Tokenizer(str(TOKENIZER))
    geometry = replace(GEOMETRY, special_tokens=tokenizer.special)
    stream = official_pipeline.PackedStream(groups, config, tokenizer, geometry)
    for batch in official_pipeline.open_loader(stream, config.num_workers):
        yield int(batch["sample_lens"].sum())


def rate(packs: Iterator[int], warm: int, seconds: float) -> Rate:
    """Of the packs of `seconds`, after `warm` others. Closes the iterator."""
    for _ in islice(packs, warm):
        pass
    start, cpu, tokens = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - start < seconds:
        tokens += next(packs)
    result = Rate(tokens, time.perf_counter() - start, cpu_seconds() - cpu)
    packs.close()
    return result


def compare(ways: dict[str, Callable[[], Iterator[int]]], rounds: int, seconds: float) -> dict[str, list[Rate]]:
    """The ways take turns, so that what else the machine does hits all of them."""
    rates: dict[str, list[Rate]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            rates[name].append(rate(way(), WARM, seconds))
            last = rates[name][-1]
            cost = 1e6 * last.cpu / last.tokens
            print(f"  {name:24} {last.per_second():9.0f} tokens/s, {cost:6.2f} s of CPU per million", flush=True)
    return rates


def memory(file: Path, config: DataConfig, samples: int) -> list[tuple[int, float]]:
    """Samples so far and MiB of this process and its workers, at ten points."""
    points, done = [], 0
    for pack in our_packs(file, config):
        done += len(pack.keys)
        if done >= (len(points) + 1) * samples / 10:
            points.append((done, resident_mib()))
            print(f"  {done:7} samples: {points[-1][1]:8.1f} MiB", flush=True)
        if len(points) == 10:
            return points
    raise RuntimeError("the reader ended")


def ratios(rates: dict[str, list[Rate]], base: str) -> dict[str, float]:
    """Of each way to `base`, median of the rounds: tokens per second, and tokens per processor second."""
    found = {}
    for name, mine in rates.items():
        if name == base:
            continue
        pairs = list(zip(mine, rates[base], strict=True))
        found[f"{name} / {base}"] = round(median(a.per_second() / b.per_second() for a, b in pairs), 2)
        cpu = median((a.tokens / a.cpu) / (b.tokens / b.cpu) for a, b in pairs)
        found[f"{name} / {base}, per CPU second"] = round(cpu, 2)
    return found


def speed(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    file = write_files(folder, options.samples, (options.shortest, options.longest), options.sizes)
    config = replace(DataConfig(), num_workers=options.workers)
    ways = {
        "plain": lambda: plain_tokens(file, config),
        "reader": lambda: our_tokens(file, config),
        "reader, pictures as floats": lambda: our_tokens(file, config, floats=True),
    }
    if options.latents:
        tokenizer = Tokenizer(str(TOKENIZER))
        moments = write_stored(file, ("vae_image",), tokenizer, options.dtype)
        both = write_stored(file, ("vae_image", "vit_image"), tokenizer, options.dtype)
        ways["stored moments"] = lambda: our_tokens(moments, config)
        ways["stored moments, features"] = lambda: our_tokens(both, config)
    print(f"{options.samples} samples, {options.workers} workers, {options.seconds:g} s a round:")
    return ratios(compare(ways, options.rounds, options.seconds), "plain")


def flatness(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    file = write_files(folder, options.samples, (32, 64), TINY)
    budgets = {"expected_num_tokens": 4096, "max_num_tokens": 4608, "prefer_buffer_before": 2048}
    config = replace(DataConfig(), num_workers=options.workers, max_num_tokens_per_sample=4096, **budgets)
    points = memory(file, config, options.memory_samples)
    return {"MiB at the end / after a fifth": round(points[-1][1] / points[1][1], 3)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", action="store_true", help="also from stored moments and ViT features")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of what is stored")
    parser.add_argument("--memory", action="store_true", help="resident memory instead of speed")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes; the numbers mean nothing")
    parser.add_argument("--folder", type=Path, help="where the files are kept; a temporary folder if left out")
    parser.add_argument("--samples", type=int, default=400, help="samples on disk; they are read again and again")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each way in a round")
    options = parser.parse_args(argv)
    options.shortest, options.longest, options.sizes, options.memory_samples = 512, 1024, OFFICIAL, 100_000
    if options.smoke:
        options.samples, options.rounds, options.seconds, options.workers = 16, 1, 0.2, 0
        options.shortest, options.longest, options.sizes, options.memory_samples = 64, 96, TINY, 500
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        found = flatness(options, folder / "tiny") if options.memory else speed(options, folder / "jpeg")
    print(json.dumps({"bench": "data", "ratios": found}))


if __name__ == "__main__":
    main()
