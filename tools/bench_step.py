"""One training step (forward and backward) of the two-stream decoder against the same layers written with index gather
and scatter around every linear, and a dense mask per sample.

    python tools/bench_step.py
    python tools/bench_step.py --tokens 2000 --layers 2 --repeats 5

Both have the same weights and give the same outputs and gradients, which is checked first. The floor is what the
matrix products alone would take: those of the linears and of the unmasked part of attention, at the rate of a square
product measured right before and after each step. Memory is the peak of a process of its own. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

import torch  # noqa: E402
from baseline.decoders import GatherScatter, TwoStreams, step  # noqa: E402
from baseline.gather_scatter import dense_attention, dense_masks  # noqa: E402
from baseline.memory import peak_memory  # noqa: E402
from baseline.mix import mixed_plan  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from megabagel.config.schema import Config, ModelConfig, ParallelConfig  # noqa: E402
from megabagel.runtime import distributed  # noqa: E402
from megabagel.training.flops import decoder_flops  # noqa: E402


def model_config(arguments: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        hidden_size=arguments.hidden,
        num_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_query_groups=arguments.kv_heads,
        ffn_hidden_size=arguments.ffn,
    )


def build(arguments: argparse.Namespace) -> tuple[dict[str, nn.Module], Tensor, Tensor, float]:
    """Both models, an input, a gradient, and the operations of a step."""
    config = Config(model=model_config(arguments))
    config.training.params_dtype = "fp32"
    plan = mixed_plan(arguments.tokens, arguments.seed, arguments.picture_tokens)
    streams = TwoStreams(config, plan, torch.device("cpu"))
    draw = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(plan.sequence_length, arguments.hidden, generator=draw) for _ in range(2))
    baseline = GatherScatter(streams, lambda: dense_attention(dense_masks(plan)))
    models = {"two streams": streams, "gather and scatter": baseline}
    return models, x.requires_grad_(), grad, decoder_flops(plan, config.model)


def check_equal(models: dict[str, nn.Module], x: Tensor, grad: Tensor) -> float:
    """Largest relative difference of outputs and of the input's gradient."""
    results = []
    for model in models.values():
        results.append((step(model, x, grad).detach(), x.grad.clone()))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))


def gemm_rate(size: int = 2048, repeats: int = 9) -> float:
    """FLOP/s of a square float32 product, the median of `repeats`."""
    a, b = torch.randn(2, size, size)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / median(seconds)


def memory_alone(arguments: list[str], name: str) -> float:
    """MiB that a step of one model adds to a process of its own."""
    command = [sys.executable, __file__, *arguments, "--memory-of", name]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, help_text in (
        ("tokens", 6144, "most tokens of the pack"),
        ("picture-tokens", 576, "about how many tokens a picture has"),
        ("hidden", 512, "hidden size"),
        ("layers", 8, "decoder layers"),
        ("heads", 8, "query heads"),
        ("kv-heads", 2, "key and value heads"),
        ("ffn", 1536, "width of the MLPs"),
        ("repeats", 7, "timed steps of each, alternating"),
        ("threads", 2, "CPU threads"),
        ("seed", 0, "of the pack"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{help_text} ({default})")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    distributed.initialize(ParallelConfig(), 0)
    models, x, grad, flops = build(arguments)
    if arguments.memory_of:
        print(peak_memory(lambda: step(models[arguments.memory_of], x, grad)))
        return
    print(f"{x.shape[0]} tokens; largest relative difference of both: {check_equal(models, x, grad):.1e}")
    seconds, shares = ({name: [] for name in models} for _ in range(2))
    rates = [gemm_rate()]
    for _ in range(arguments.repeats):
        for name, model in models.items():
            start = time.perf_counter()
            step(model, x, grad)
            seconds[name].append(time.perf_counter() - start)
            rates.append(gemm_rate())
            shares[name].append(flops / mean(rates[-2:]) / seconds[name][-1])
    memory = {name: memory_alone(sys.argv[1:], name) for name in models}
    print(f"floor {flops / median(rates):.2f} s: {flops / 1e9:.0f} GFLOP at {median(rates) / 1e9:.0f} GFLOP/s")
    for name, times in seconds.items():
        spread = f"median {median(times):.2f} s ({min(times):.2f} to {max(times):.2f})"
        share = f"{median(shares[name]):.0%} of the floor's rate ({min(shares[name]):.0%} to {max(shares[name]):.0%})"
        print(f"{name}: {spread}, {share}, {memory[name]:.0f} MiB")
    ours, theirs = models
    ratios = {
        "speed-up over gather and scatter": median(seconds[theirs]) / median(seconds[ours]),
        "share of the floor": median(shares[ours]),
        "share of the floor, gather and scatter": median(shares[theirs]),
        "peak memory against gather and scatter": memory[ours] / memory[theirs],
    }
    units = dict.fromkeys(ratios, "ratio")
    print(json.dumps({"bench": "step", "ratios": {k: round(v, 3) for k, v in ratios.items()}, "units": units}))


if __name__ == "__main__":
    main()
