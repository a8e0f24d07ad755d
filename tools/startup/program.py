"""One rank of `bench_startup.py`: prepares what a run starts from, or starts a run and counts memory on the way.

The trainer is that of `training/setup.py`; only its reader, which needs data, is left out.
"""

import json
from pathlib import Path
from unittest import mock

import torch
from baseline.memory import peak_memory, resident
from torch import Tensor

from megabagel.checkpoint.hf import stage_rules
from megabagel.checkpoint.names import export_shard
from megabagel.checkpoint.safetensors_file import SafetensorsFile, Spec, make_head
from megabagel.config.schema import Config
from megabagel.runtime.distributed import Layout, initialize
from megabagel.training import setup
from megabagel.training.loop import Trainer


class NoData:
    """Stands in for the reader of data."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...


def build(config: Config, layout: Layout) -> Trainer:
    with mock.patch.object(setup, "ReplicaReader", lambda *_: NoData()):
        return setup.build_trainer(config, layout)


def prepare(config: Config, folder: Path) -> None:
    """Write `folder`/bagel, a BAGEL folder, and `folder`/run, a run folder with a checkpoint that has moments."""
    layout = initialize(config.parallel, config.training.seed)
    config.checkpoint.run_dir = str(folder / "run")
    trainer = build(config, layout)
    (stage,) = trainer.stages
    rules = stage_rules(stage.module)
    tensors = {
        name: part
        for parameter, value in stage.module.named_parameters()
        for name, (part, _) in export_shard(value.detach(), rules[parameter]).items()
    }
    (folder / "bagel").mkdir()
    path = folder / "bagel" / "ema.safetensors"
    specs = {name: Spec(tuple(part.shape), part.dtype) for name, part in tensors.items()}
    file = SafetensorsFile(path, make_head(specs))
    file.begin()
    for name, part in tensors.items():
        file.write(name, part)
    trainer.optimizer.step()  # gradients are zero: the moments come to be
    trainer.step = 1
    trainer.save()


def start(config: Config, report: Path) -> None:
    """Start a run and write down, in bytes: peak and end of resident memory, own state, largest tensor."""
    layout = initialize(config.parallel, config.training.seed)
    trainers = []
    before = resident()
    peak = peak_memory(lambda: trainers.append(_ready(build(config, layout)))) * 2**20
    (trainer,) = trainers
    parameters = [parameter for stage in trainer.stages for parameter in stage.parameters()]
    report.with_name(f"{report.name}-{layout.rank}.json").write_text(
        json.dumps(
            {
                "peak": peak,
                "end": (resident() - before) * 2**20,
                "state": sum(storage.nbytes() for storage in _storages(trainer)),
                "largest": 4 * max(parameter.numel() for parameter in parameters),  # in float32
            }
        )
    )


def _ready(trainer: Trainer) -> Trainer:
    """To begin a step: gradients are cleared, which makes them resident."""
    for stage in trainer.stages:
        stage.zero_grad_buffer()
    return trainer


def _storages(trainer: Trainer) -> list[torch.UntypedStorage]:
    """Of parameters, gradients, main parameters, moments and average: all that a rank keeps."""
    tensors: list[Tensor] = [*trainer.ema.shards]
    for stage in trainer.stages:
        tensors += stage.parameters()
        tensors += [buffer.grad_data for buffer in [*stage.buffers, *stage.expert_parallel_buffers]]
    for part in trainer.ema.optimizers:
        tensors += [main for group in part.optimizer.param_groups for main in group["params"]]
        tensors += [state[name] for state in part.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return list({tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}.values())
