"""Saving a checkpoint in the background against waiting for it: how long training stands still, speed and memory.

    python tools/bench_checkpoint.py
    python tools/bench_checkpoint.py --hidden 1024 --layers 8 --folder /scratch/bench
    torchrun --nproc-per-node 2 tools/bench_checkpoint.py

A BAGEL model in bf16 (weights and float32 main parameters, both moments, average: 18 bytes a parameter) is saved in
turn both ways. Every save goes to a new folder, is synced to the disk, and is removed outside of the measured time.
Memory is the peak above the state itself, of rank 0: what the first background save adds stays for the next ones. The
last save is loaded back and compared bit by bit. The last line is JSON.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from baseline.memory import peak_memory  # noqa: E402

from megabagel.config.schema import Config, ModelConfig, VisionConfig  # noqa: E402
from megabagel.runtime.distributed import Layout, destroy, initialize  # noqa: E402

WAYS = {"waited for": False, "background": True}


class Case:
    """Model, optimizer and average after one step with random gradients, and a saver of each way."""

    def __init__(self, arguments: argparse.Namespace, layout: Layout, folder: Path):
        from megabagel.checkpoint.saver import Saver  # after the device is chosen
        from megabagel.models.build import build_stages
        from megabagel.training.ema import ShardedEma
        from megabagel.training.optimizer import build_optimizer
        from megabagel.training.wrap import wrap

        self.folder, self.number = folder, 0
        config = Config()
        config.model = ModelConfig(
            hidden_size=arguments.hidden,
            num_layers=arguments.layers,
            num_attention_heads=8,
            num_query_groups=2,
            ffn_hidden_size=3 * arguments.hidden,
            vocab_size=4096,
            vit=VisionConfig(64, 2, 2, 128, patch_size=14, max_num_patch_per_side=8),
        )
        config.training.params_dtype = "bf16"
        self.stages = wrap(build_stages(config, layout.device), config.parallel)
        with torch.no_grad():
            for parameter in self.stages[0].parameters():
                parameter.normal_(std=0.02)
        self.optimizer = build_optimizer(config.optimizer, config.training, config.parallel, self.stages)
        self.stages[0].zero_grad_buffer()
        for parameter in self.stages[0].parameters():
            if parameter.requires_grad:
                parameter.main_grad.normal_()
        self.optimizer.step()
        self.average = ShardedEma(self.optimizer)
        self.savers = {way: Saver(background) for way, background in WAYS.items()}

    def save(self, way: str) -> Path:
        """Start a save into a new folder."""
        from megabagel.checkpoint import distributed as checkpoint

        self.number += 1
        run_dir = self.folder / f"{self.number}"
        checkpoint.save(
            run_dir, 1, self.stages, self.optimizer, self.average, data_state=None, counters={}, config_yaml="",
            saver=self.savers[way],
        )  # fmt: skip
        return run_dir

    def measure(self, way: str) -> tuple[dict[str, float], Path]:
        """The times of one save."""
        dist.barrier()
        run_dir = self.save(way)
        self.savers[way].wait()
        return self.savers[way].take_times(), run_dir

    def check(self, run_dir: Path) -> None:
        """Loads a save over disturbed state."""
        from megabagel.checkpoint import distributed as checkpoint

        def state() -> list[torch.Tensor]:
            mains = [p for group in self.optimizer.param_groups for p in group["params"]]
            return [*mains, *self.average.shards, *self.stages[0].parameters()]

        before = [tensor.detach().clone() for tensor in state()]
        with torch.no_grad():
            for tensor in state():
                tensor.zero_()
        checkpoint.load(run_dir, self.stages, self.optimizer, self.average)
        assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True)), "what is loaded differs"


def remove(run_dir: Path) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(run_dir)
    dist.barrier()


def spread(values: list[float]) -> str:
    return f"median {median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def report(arguments: argparse.Namespace, layout: Layout, folder: Path) -> None:
    case = Case(arguments, layout, folder)
    memory, blocked, total = {}, {way: [] for way in WAYS}, {way: [] for way in WAYS}
    for way in WAYS:  # what is done first pays for it: memory is taken from the system
        results = []
        memory[way] = peak_memory(lambda way=way, results=results: results.append(case.measure(way)[1]))
        size = sum(path.stat().st_size for path in results[0].rglob("*") if path.is_file())
        remove(results[0])
    for _ in range(arguments.repeats):
        for way in WAYS:
            times, run_dir = case.measure(way)
            blocked[way].append(times["save_blocked_time"])
            total[way].append(times["save_time"])
            last, previous = run_dir, run_dir
            if (way, len(blocked[way])) != (list(WAYS)[-1], arguments.repeats):
                remove(previous)
    case.check(last)
    if layout.rank:
        return
    print(f"state of all ranks: {size / 1e6:.0f} MB")
    for way in WAYS:
        print(
            f"{way}: training stands still for {spread(blocked[way])} s; on disk after {spread(total[way])} s, "
            f"{size / median(total[way]) / 1e6:.0f} MB/s; {memory[way]:.0f} MiB above the state"
        )
    ratios = {
        "background against waited for, time that training stands still": median(blocked["background"])
        / median(blocked["waited for"]),
        "background against waited for, time until it is on disk": median(total["background"])
        / median(total["waited for"]),
        "waited for, peak memory above the state against the state of a rank": memory["waited for"]
        / (size / 2**20 / layout.world_size),
        "background, peak memory above the state against the state of a rank": memory["background"]
        / (size / 2**20 / layout.world_size),
    }
    units = dict.fromkeys(ratios, "ratio")
    print(json.dumps({"bench": "checkpoint", "ratios": {k: round(v, 3) for k, v in ratios.items()}, "units": units}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="hidden size (512)")
    parser.add_argument("--layers", type=int, default=6, help="decoder layers (6)")
    parser.add_argument("--repeats", type=int, default=5, help="timed saves of each way, in turn (5)")
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder)")
    arguments = parser.parse_args()
    from megabagel.config.schema import ParallelConfig

    layout = initialize(ParallelConfig(), seed=1)
    made = [tempfile.mkdtemp(dir=arguments.folder) if layout.rank == 0 else None]
    dist.broadcast_object_list(made)
    try:
        report(arguments, layout, Path(made[0]))
    finally:
        if layout.rank == 0:
            shutil.rmtree(made[0], ignore_errors=True)
    destroy()


if __name__ == "__main__":
    main()
