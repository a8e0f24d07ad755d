"""Makes a checkpoint of ours of a BAGEL folder, as on the Hugging Face Hub, without starting a run.

    python tools/convert_hf_to_dist.py --hf BAGEL-7B-MoT --out checkpoints/bagel
    python tools/convert_hf_to_dist.py --hf results/0002000 --base BAGEL-7B-MoT --out checkpoints/official-2000
    python tools/convert_hf_to_dist.py --llm Qwen2.5-7B-Instruct --vit siglip-so400m-14-980 --vae FLUX.1-dev --out START

A run begins with it by --checkpoint.init_from OUT --model.folder OUT; convert_dist_to_hf.py gives the folder back, to
the bit and without --base. Where there are live weights and a moving average (model.safetensors and ema.safetensors),
both are taken. Rows go piece by piece from file to file: memory does not grow with the model. Started again after an
interruption, it goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.import_folder import import_folder, plan_import
from megabagel.checkpoint.start_folders import StartFolders
from megabagel.config.errors import ConfigError
from megabagel.models.specs import SHARED_PARTS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--hf", type=Path, help="BAGEL folder, or folder of an official training checkpoint")
    weights.add_argument("--llm", type=Path, help="Qwen2.5 folder; gen weights start as copies of its tensors")
    parser.add_argument("--vit", type=Path, help="with --llm: SigLIP folder (none: the model sees no pictures)")
    parser.add_argument(
        "--vae", type=Path, help="with --llm: ae.safetensors or its folder (none: no pictures are made)"
    )
    parser.add_argument("--variant", choices=sorted(SHARED_PARTS), default="mot", help="with --llm: the kind of layer")
    parser.add_argument("--base", type=Path, help="BAGEL folder with the configurations and tokenizer that --hf lacks")
    parser.add_argument("--out", required=True, help="run folder to make; must be empty or an interrupted conversion")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--ema", dest="only", action="store_const", const="ema", help="take ema.safetensors alone")
    only.add_argument("--model", dest="only", action="store_const", const="model", help="take model.safetensors alone")
    parser.add_argument("--dtype", choices=DTYPES, help="of all tensors (default: as in the folder; bf16 with --llm)")
    parser.add_argument("--processes", type=int, default=1, help="that read and write side by side")
    arguments = parser.parse_args(argv)
    if arguments.hf is not None and (arguments.vit or arguments.vae):
        parser.error("--vit and --vae go with --llm; a BAGEL folder has its own")
    if arguments.llm is not None and (arguments.base or arguments.only):
        parser.error("--base, --ema and --model go with --hf")
    start = arguments.hf or StartFolders(arguments.llm, arguments.vit, arguments.vae, arguments.variant)
    try:
        plan = plan_import(
            start,
            arguments.out,
            base=arguments.base,
            only=arguments.only,
            dtype=DTYPES.get(arguments.dtype),
        )
        with tqdm(total=plan.num_bytes, unit="B", unit_scale=True, desc=Path(arguments.out).name) as bar:
            folder = import_folder(plan, arguments.processes, bar.update)
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sets = " and ".join(stem or "start weights" for stem in plan.sets.values())
    print(f"{len(plan.shapes)} tensors of {arguments.hf or arguments.llm} ({sets}) are in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
