"""Evaluate a model: `python -m megabagel.evaluate --model FOLDER --config FILE`, alone or under torchrun.

Each process holds the model (--tensor-parallel: so many share it) and does its share of the work; scores do not depend
on how many there are. What an interrupted evaluation has done is not done again.

    python -m megabagel.evaluate --model runs/mine --config examples/evaluation/evaluation.yaml --out runs/mine/scores
    torchrun --standalone --nproc_per_node 8 -m megabagel.evaluate --model BAGEL-7B-MoT --config eval.yaml --out scores
"""

import argparse
from dataclasses import fields
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.torch_dist import checkpoint_folder
from megabagel.config.errors import ConfigError
from megabagel.config.folder import is_checkpoint
from megabagel.data.faults import DataError, DataFault
from megabagel.evaluation.run import model_faults, read_tasks, run
from megabagel.evaluation.settings import Models, read_settings
from megabagel.evaluation.share import Share
from megabagel.inference import load
from megabagel.inference.options import add_model_options, model_settings
from megabagel.models.autoencoder import AutoencoderError
from megabagel.runtime import distributed, failure


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "megabagel.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--model", required=True, help="BAGEL folder, run folder or iter_... folder")
    add("--config", required=True, help="YAML file of tasks; see examples/evaluation")
    add("--out", required=True, help="folder of results.json, results.md, contact sheets, answers and pictures")
    add_model_options(result)
    add("--tensor-parallel", type=int, default=1, help="processes that share one copy of the model (1)")
    for one in fields(Models):
        add(f"--{one.name}", metavar="PATH", help=f"in place of models.{one.name} of the settings")
    return result


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    with failure.guard(ConfigError, DataError, DataFault, CheckpointError, AutoencoderError):
        settings = read_settings(options.config, {one.name: getattr(options, one.name) for one in fields(Models)})
        items = read_tasks(settings)
        bagel = load(options.model, tensor_parallel=options.tensor_parallel, **model_settings(options))
        model_faults(bagel, items, settings)
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        share = Share(replica, replicas, parallel_state.get_tensor_model_parallel_rank() == 0)
        table = run(settings, items, bagel, share, Path(options.out), described(options))
        if dist.get_rank() == 0:
            print(table + f"\nresults, contact sheets, answers and pictures are in {options.out}")
        distributed.destroy()


def described(options: argparse.Namespace) -> dict[str, object]:
    """Which weights the results are of."""
    folder = Path(options.model).absolute()
    step = None
    if is_checkpoint(folder):
        folder = checkpoint_folder(folder)
        step = int(folder.name.rpartition("_")[2])
    return {"folder": str(folder), "step": step, "weights": options.weights, "dtype": options.dtype}


if __name__ == "__main__":
    main()
