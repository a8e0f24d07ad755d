"""Makes a plain Hugging Face language model of the understanding part of a BAGEL model, which transformers loads.

    python tools/export_qwen2.py --checkpoint BAGEL-7B-MoT --out BAGEL-7B-text
    python tools/export_qwen2.py --checkpoint runs/mine --weights model --dtype bf16 --out mine-text

A model trained without norms on queries and keys (model.qk_layernorm false) becomes a Qwen2ForCausalLM. BAGEL has these
norms and Qwen2 has not, so it becomes a Qwen3ForCausalLM, which computes exactly the same. Pictures, and the
weights that generate them, are left out. Tensors go one by one: memory does not grow with the model.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.given_weights import open_weights
from megabagel.checkpoint.language_model import ARCHITECTURES, export_language_model, plan
from megabagel.config.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="BAGEL folder, run folder or iter_... folder")
    parser.add_argument("--out", required=True, help="folder to write; must be empty")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="moving average or live weights")
    parser.add_argument("--architecture", choices=ARCHITECTURES, help="default: the one that is exact")
    parser.add_argument("--dtype", choices=DTYPES, help="of all tensors (default: as stored, or as the run computed)")
    arguments = parser.parse_args(argv)
    try:
        given = open_weights(arguments.checkpoint, arguments.weights)
        work = plan(given, arguments.out, kind=arguments.architecture, dtype=DTYPES.get(arguments.dtype))
        with tqdm(total=work.num_bytes, unit="B", unit_scale=True, desc=Path(arguments.out).name) as bar:
            export_language_model(work, bar.update)
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    count = sum(len(specs) for specs in work.files.values())
    print(f"{count} tensors of {given.source.folder} are in {arguments.out}, a {ARCHITECTURES[work.kind]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
