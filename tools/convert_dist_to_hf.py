"""Makes a BAGEL folder, as on the Hugging Face Hub, of a checkpoint that training wrote.

    python tools/convert_dist_to_hf.py --checkpoint runs/mine --out BAGEL-mine
    python tools/convert_dist_to_hf.py --checkpoint runs/mine/iter_0002000 --weights model --base BAGEL-7B-MoT --out OUT

Tensors go one by one from file to file: memory does not grow with the model. Started again after an interruption, it
goes on where it stopped. Tensor names, dtypes, division into files, configurations, tokenizer and autoencoder come from
the folder that the run began with (--base, or what the checkpoint carries, or what its configuration names); without
one they are made anew.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.export import export
from megabagel.checkpoint.export_plan import plan_export
from megabagel.config.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run folder (its newest checkpoint) or iter_... folder")
    parser.add_argument("--out", required=True, help="folder to write; must be empty or an interrupted export")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--weights",
        choices=("ema", "model", "both"),
        help="moving average, live weights or a file of each (default: what convert_hf_to_dist found, else ema)",
    )
    which.add_argument("--ema", dest="weights", action="store_const", const="ema", help="short for --weights ema")
    which.add_argument("--model", dest="weights", action="store_const", const="model", help="short for --weights model")
    parser.add_argument(
        "--base", help="BAGEL folder that the run began with (default: what the checkpoint carries or its run names)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of all tensors (default: as in the base folder, or the run's)")
    parser.add_argument("--max-file-gb", type=float, help="divide the weights into files of at most so many GB")
    parser.add_argument("--processes", type=int, default=1, help="that read and write side by side")
    arguments = parser.parse_args(argv)
    limit = arguments.max_file_gb
    try:
        plan = plan_export(
            arguments.checkpoint,
            arguments.out,
            weights=arguments.weights,
            base=arguments.base,
            dtype=DTYPES.get(arguments.dtype),
            max_file_bytes=None if limit is None else int(limit * 1e9),
        )
        with tqdm(total=plan.num_bytes, unit="B", unit_scale=True, desc=Path(arguments.out).name) as bar:
            export(plan, arguments.processes, bar.update)
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    count = sum(len(file.specs) for file in plan.open().values())
    print(f"{count} tensors of {plan.checkpoint} ({' and '.join(plan.weights)}) are in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
