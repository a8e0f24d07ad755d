"""Makes a start checkpoint with sparse experts out of a dense model: every expert is a copy of the stream's MLP.

    python tools/upcycle_checkpoint.py --checkpoint BAGEL-7B-MoT --out start --gen-num-experts 8
    python tools/upcycle_checkpoint.py --checkpoint runs/mine --out start --und-num-experts 4 --gen-num-experts 8 \\
        --moe-shared-expert-intermediate-size 2048

Training from it (checkpoint.init_from, in any layout, with the same numbers in the model's settings) begins with the
outputs of the dense model: the weights of a token's experts sum to 1, and a shared expert's last projection starts at
zero. Routers and shared experts are new. Parameters go one by one: memory does not grow with the model.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.sparse_start import plan_upcycling, upcycle
from megabagel.config.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="BAGEL folder, run folder or iter_... folder; dense")
    parser.add_argument("--out", required=True, help="run folder to write; must be empty")
    parser.add_argument("--und-num-experts", type=int, help="in the understanding stream (default: its MLP stays)")
    parser.add_argument("--gen-num-experts", type=int, help="in the generation stream (default: its MLP stays)")
    parser.add_argument("--moe-shared-expert-intermediate-size", type=int, help="width of an expert for every token")
    parser.add_argument("--weights", choices=("ema", "model"), help="take these alone (default: both, where both are)")
    arguments = parser.parse_args(argv)
    shared = arguments.moe_shared_expert_intermediate_size
    try:
        plan = plan_upcycling(
            arguments.checkpoint,
            arguments.out,
            und_num_experts=arguments.und_num_experts,
            gen_num_experts=arguments.gen_num_experts,
            shared_expert_size=shared,
            weights=arguments.weights,
        )
        with tqdm(total=plan.num_bytes, unit="B", unit_scale=True, desc=Path(arguments.out).name) as bar:
            folder = upcycle(plan, bar.update)
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    settings = {"und_num_experts": arguments.und_num_experts, "gen_num_experts": arguments.gen_num_experts}
    settings["moe_shared_expert_intermediate_size"] = shared
    flags = " ".join(f"--model.{name} {value}" for name, value in settings.items() if value is not None)
    print(f"{folder} is ready; train from it with --checkpoint.init_from {arguments.out} {flags}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
