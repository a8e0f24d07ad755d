"""What every process of measure_layouts.py does: train two steps in each layout and say what this rank kept and sent.

The model, the wrapping, the schedule, the optimizer and the encode phase are the trainer's own.
"""

import gc
import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from layouts.allocator import AllocatorPeak
from layouts.choice import Choice, check_layout, parse_choice
from layouts.memory import ActivationMeter, average_bytes, gradient_bytes, optimizer_bytes, parameter_bytes
from layouts.traffic import Traffic
from layouts.workload import make_packs, small_config
from megabagel.checkpoint.hf import load_weights, open_source
from megabagel.models.autoencoder import Autoencoder
from megabagel.models.build import DTYPES, build_stages
from megabagel.runtime import failure
from megabagel.runtime.distributed import destroy, initialize, world_size
from megabagel.training.ema import ShardedEma
from megabagel.training.encode import Encoder
from megabagel.training.optimizer import build_optimizer
from megabagel.training.step import count, forward_backward
from megabagel.training.wrap import wrap


@dataclass
class RankReport:
    """Bytes on one rank. `sent` and `encode_sent`: by kind, of one step and of its encode phase."""

    parameters: int
    mlp_parameters: int
    gradients: int
    mlp_gradients: int
    optimizer: int
    mlp_optimizer: int
    average: int
    activations: int
    peak: int  # beyond the state, forward and backward
    sent: dict[str, int]
    calls: dict[str, int]
    encode_sent: dict[str, int]
    seconds: float  # of the measured step, for orientation only


@contextmanager
def _watch(stages: list[nn.Module], meter: ActivationMeter, allocator: AllocatorPeak) -> Iterator[None]:
    """Both count until gradients are reduced, after the last backward pass: gloo copies what others reduce in place."""
    finalize = stages[0].config.finalize_model_grads_func

    def stop_and_finalize(*arguments: object, **options: object) -> None:
        allocator.stop()
        finalize(*arguments, **options)

    stages[0].config.finalize_model_grads_func = stop_and_finalize
    try:
        with meter, allocator:
            yield
    finally:
        stages[0].config.finalize_model_grads_func = finalize


def measure(choice: Choice, packs_per_step: int) -> RankReport:
    """Two steps in one layout, the second watched: with overlap, the first step's parameters travel in the second."""
    config = choice.apply(small_config(packs_per_step))
    check_layout(config, world_size())
    layout = initialize(config.parallel, config.training.seed)
    stages = build_stages(config, layout.device)
    load_weights(stages, open_source(config))
    stages = wrap(stages, config.parallel)
    optimizer = build_optimizer(config.optimizer, config.training, config.parallel, stages)
    ema = ShardedEma(optimizer)
    torch.manual_seed(0)
    autoencoder = Autoencoder(config.model.vae).to(layout.device, DTYPES[config.training.params_dtype])
    encoder = Encoder(config, layout, autoencoder)
    packs = make_packs(config, layout.dp_rank, layout.dp_size)
    plans = [pack.plan for pack in packs]
    rows = plans[0].und_length + plans[0].gen_length
    meter, allocator, traffic, encode_traffic = ActivationMeter(stages), AllocatorPeak(), Traffic(), Traffic()
    for watched in (False, True):
        start = time.perf_counter()
        with encode_traffic if watched else nullcontext():
            inputs = encoder(packs)
        with traffic if watched else nullcontext():
            for chunk in stages:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            counts = count(plans, config.training, layout.device)
            batches = list(zip(plans, inputs, strict=True))
            with _watch(stages, meter, allocator) if watched else nullcontext():
                forward_backward(stages, batches, counts, config.training, rows)
            optimizer.step()
        ema.update(0.9)
        seconds = time.perf_counter() - start
    report = RankReport(
        *parameter_bytes(stages),
        *gradient_bytes(stages),
        *optimizer_bytes(optimizer, stages),
        average_bytes(ema),
        meter.peak,
        allocator.peak,
        dict(traffic.sent),
        dict(traffic.calls),
        dict(encode_traffic.sent),
        seconds,
    )
    return report


def run(names: list[str], packs_per_step: int, result: Path) -> None:
    """Measure the layouts one after the other; rank 0 writes {layout: [report of each rank]} to `result` as JSON."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with failure.guard(ValueError):
        reports = {}
        rank = int(os.environ.get("RANK", 0))
        for number, name in enumerate(names):
            # every layout has groups of its own: those of all layouts together would be thousands of threads
            store = dist.FileStore(str(result.with_name(f"store{number}")), world_size())
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size())
            own = asdict(measure(parse_choice(name), packs_per_step))
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, own)
            reports[name] = gathered
            gc.collect()  # modules and buffers hold the groups
            dist.barrier()
            destroy()
            if rank == 0:
                print(f"{name}: {own['seconds']:.1f} s a step", flush=True)
        if rank == 0:
            result.write_text(json.dumps(reports))
