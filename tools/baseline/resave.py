"""Loads weights into a model in some layout and saves the model alone, without optimizer or average.

torchrun --nproc_per_node 4 tools/baseline/resave.py --weights FOLDER --out RUN_DIR --tensor 2 --pipeline 2
"""

import argparse
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megabagel.checkpoint.hf import load_weights, open_source
from megabagel.config.folder import read_model_config
from megabagel.config.load import to_yaml
from megabagel.config.schema import CheckpointConfig, Config, ModelConfig, ParallelConfig, TrainingConfig

from megabagel.runtime.distributed import destroy, initialize  # isort: skip  megatron-core is adapted first

import torch.distributed as dist

from megabagel.checkpoint import folder
from megabagel.checkpoint.places import placed
from megabagel.checkpoint.torch_dist_writer import PieceWriter, finish
from megabagel.models.build import build_stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="BAGEL folder")
    parser.add_argument("--out", required=True, help="run folder to make")
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--pipeline", type=int, default=2)
    arguments = parser.parse_args()
    parallel = ParallelConfig(arguments.tensor, arguments.pipeline)
    layout = initialize(parallel, 0)
    checkpoint = CheckpointConfig(init_from=arguments.weights)
    model = read_model_config(arguments.weights, ModelConfig())
    config = Config(model, parallel, training=TrainingConfig(params_dtype="bf16"), checkpoint=checkpoint)
    stages = build_stages(config, layout.device)
    source = open_source(config)
    load_weights(stages, source)
    source.close()
    if layout.rank == 0:
        folder.begin(arguments.out, 0)
    dist.barrier()
    tensors, _ = placed([SimpleNamespace(module=stage) for stage in stages])
    pieces = [piece for t in tensors if not any(t.replica) for piece in t.pieces(t.data.detach().view(-1), 0)]
    partial = folder.partial_folder(arguments.out, 0)
    written = [None] * layout.world_size
    dist.all_gather_object(written, PieceWriter(partial, layout.rank).write(pieces))
    if layout.rank == 0:
        run = {"step": 0, "counters": {}, "optimizer_steps": 0, "data_state": None, "has_ema": False}
        run |= {"config_yaml": to_yaml(config), "layout": (arguments.tensor, 1, 1, arguments.pipeline, layout.dp_size)}
        files = finish(partial, written, {"run": run})
        folder.finish(arguments.out, 0, {n: folder.FileRecord(r.size, r.crc32) for n, r in files.items()})
    print(f"rank {layout.rank}: peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB", flush=True)
    destroy()


if __name__ == "__main__":
    main()
