"""One training step (forward and backward) of decoder layers of BAGEL-7B's shape on this machine's GPU: megabagel's two
streams against index gather and scatter around every linear and norm with FlexAttention, as BAGEL itself trains.

    python tools/bench_layers.py                       # as many layers as fit, about 34k packed tokens, BF16
    python tools/bench_layers.py --layers 4 --attention flex
    python tools/bench_layers.py --scale tiny          # a check of both on the CPU, nothing worth timing

Same weights, same pack, outputs and gradients compared first, timed in turn in one process. Embeddings, heads, losses
and the optimizer are left out. MFU is given twice: by BAGEL's formula, which counts every pair of a sample's tokens as
attended, and by the visible pairs alone. The last line is JSON.
"""

import argparse
import dataclasses
import gc
import json
import sys
import time
import warnings
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

import torch  # noqa: E402
from baseline.decoders import GatherScatter, TwoStreams, step  # noqa: E402
from baseline.flex_mask import flex_masked_attention  # noqa: E402
from baseline.gather_scatter import Attention, dense_attention, dense_masks  # noqa: E402
from baseline.mix import mixed_plan  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from megabagel.config.schema import Config, KernelConfig, ModelConfig, ParallelConfig, TrainingConfig  # noqa: E402
from megabagel.models.build import DTYPES  # noqa: E402
from megabagel.packing.plan import PackPlan  # noqa: E402
from megabagel.runtime import distributed  # noqa: E402
from megabagel.training.flops import decoder_flops, official_flops, peak_tflops  # noqa: E402

OURS, THEIRS = "two streams", "gather and scatter"
MOST_LAYERS = 28
MEMORY_SHARE = 0.8  # of the GPU, of which the number of layers is chosen
SHAPES = {
    "7b": (ModelConfig(), "bf16"),
    "tiny": (
        ModelConfig(hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=160, num_layers=2),
        "fp32",
    ),
}


class Bench:
    """Both decoders on one device, with an input and a gradient for their output."""

    def __init__(self, config: Config, plan: PackPlan, device: torch.device):
        self.config, self.plan, self.device = config, plan, device
        streams = TwoStreams(config, plan, device)
        baseline = GatherScatter(streams, self._attention)
        self.models: dict[str, nn.Module] = {OURS: streams, THEIRS: baseline}
        draw = torch.Generator(device).manual_seed(1)
        shape, dtype = (plan.sequence_length, config.model.hidden_size), DTYPES[config.training.params_dtype]
        self.x, self.grad = (torch.randn(shape, generator=draw, device=device).to(dtype) for _ in range(2))
        self.x.requires_grad_()

    def _attention(self) -> Attention:
        """The baseline's; FlexAttention has no backward pass on the CPU."""
        if self.device.type == "cpu":
            return dense_attention(dense_masks(self.plan))
        return flex_masked_attention(self.plan, self.device)

    def run(self, name: str) -> tuple[float, Tensor, Tensor]:
        """One step -> seconds, output, gradient of the input; gradients of the weights are freed."""
        model = self.models[name]
        self._wait()
        start = time.perf_counter()
        out = step(model, self.x, self.grad)
        self._wait()
        seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
        return seconds, out.detach(), self.x.grad

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def difference(self) -> float:
        """Largest relative difference of outputs and of the input's gradient."""
        ours, theirs = (self.run(name)[1:] for name in self.models)
        return max(
            float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(ours, theirs, strict=True)
        )

    def peak_gib(self, name: str) -> float:
        """GPU memory at the peak of a step beyond the weights, which are there for both."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.run(name)
        return (torch.cuda.max_memory_allocated() - before) / 2**30


def layers_that_fit(config: Config, plan: PackPlan, device: torch.device) -> int:
    """Found by one layer's peak, weights of both decoders included."""
    config.model.num_layers = 1
    bench = Bench(config, plan, device)
    torch.cuda.reset_peak_memory_stats()
    for name in bench.models:
        bench.run(name)
    one = torch.cuda.max_memory_allocated()
    del bench
    gc.collect()  # the baseline holds the bench, which holds it
    torch.cuda.empty_cache()
    return max(1, min(MOST_LAYERS, int(MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory / one)))


def measure(bench: Bench, repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in turn, after two steps to warm up."""
    seconds = {name: [] for name in bench.models}
    for number in range(repeats + 2):
        for name in bench.models:
            taken = bench.run(name)[0]
            if number >= 2:
                seconds[name].append(taken)
    return seconds


def describe(bench: Bench, name: str, times: list[float], peak: float | None) -> dict[str, float]:
    """What is reported of one decoder; rates by the median."""
    model, middle = bench.config.model, median(times)
    of_layers = dataclasses.replace(model, vocab_size=0)
    counted = {"mask-aware": decoder_flops(bench.plan, model), "official": official_flops(bench.plan, of_layers)}
    values = {"ms": 1e3 * middle, "ms least": 1e3 * min(times), "ms most": 1e3 * max(times)}
    values["tokens/s"] = bench.plan.sequence_length / middle
    for formula, flops in counted.items():
        values[f"TFLOP/s {formula}"] = flops / middle / 1e12
        if peak:
            values[f"MFU {formula}"] = flops / middle / 1e12 / peak
    if bench.device.type == "cuda":
        values["GiB"] = bench.peak_gib(name)
    return {key: float(f"{value:.4g}") for key, value in values.items()}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SHAPES, default="7b", help="7b needs a GPU")
    parser.add_argument("--layers", type=int, help="default: as many as fit")
    parser.add_argument("--tokens", type=int, default=34_100, help="most tokens of the pack (34100)")
    parser.add_argument("--picture-tokens", type=int, default=1024, help="about how many tokens a picture has (1024)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16, for tiny fp32")
    parser.add_argument("--attention", default="auto", help="megabagel's backend: auto, varlen, flex or sdpa (auto)")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each, alternating (7)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    warnings.filterwarnings("ignore", module="megatron")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.scale == "7b" and device.type == "cpu":
        sys.exit("error: layers of the 7B shape need a GPU; --scale tiny compares both decoders on the CPU.")
    distributed.initialize(ParallelConfig(), 0)
    model, dtype = SHAPES[options.scale]
    config = Config(
        model=model,
        training=TrainingConfig(params_dtype=options.dtype or dtype),
        kernels=KernelConfig(transformer_impl="local", attention_backend=options.attention),
    )
    plan = mixed_plan(options.tokens, area=options.picture_tokens)
    if options.layers:
        model.num_layers = options.layers
    elif device.type == "cuda":
        model.num_layers = layers_that_fit(config, plan, device)
    bench = Bench(config, plan, device)
    difference = bench.difference()
    print(f"{plan.sequence_length} tokens, {model.num_layers} layers, {device}, {config.training.params_dtype}")
    print(f"largest relative difference of outputs and gradients: {difference:.1e}")
    peak = None
    if device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(device), config.training.params_dtype)
    values = {name: describe(bench, name, t, peak) for name, t in measure(bench, options.repeats).items()}
    for name, of_name in values.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in of_name.items()))
    ratios = {"speed-up over gather and scatter": values[THEIRS]["ms"] / values[OURS]["ms"]}
    if "GiB" in values[OURS]:
        ratios["peak memory against gather and scatter"] = values[OURS]["GiB"] / values[THEIRS]["GiB"]
    line = {"bench": "layers", "ratios": {k: round(v, 3) for k, v in ratios.items()}}
    line |= {"units": dict.fromkeys(ratios, "ratio"), "difference": difference, "layers": model.num_layers}
    print(json.dumps({**line, "tokens": plan.sequence_length, "peak TFLOP/s": peak, "values": values}))


if __name__ == "__main__":
    main(sys.argv[1:])
