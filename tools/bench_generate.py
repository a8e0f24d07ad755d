"""Generation with cached contexts against the plain way, which reads everything again for every step and every token.

    python tools/bench_generate.py
    python tools/bench_generate.py --prompt 50 --steps 20 --tokens 32 --batch 1 4

Pictures: guided text-to-image (scale 4 at all times) with a prompt of so many tokens; text: greedy answers to such a
prompt. The plain way runs the same modules on a pack of all branches or requests, whose plan for pictures is made once.
The model has the shape of the demo preset and random weights; both ways must agree, which is checked. The last line is
JSON.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT),) if path not in sys.path]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megabagel.checkpoint.hf import load_weights, open_source  # noqa: E402
from megabagel.config.load import load_config  # noqa: E402
from megabagel.config.schema import CheckpointConfig, ParallelConfig  # noqa: E402
from megabagel.inference.flow import Canvas, FlowSettings, denoise, flow_schedule  # noqa: E402
from megabagel.inference.guidance import Guidance, guide  # noqa: E402
from megabagel.inference.network import Network  # noqa: E402
from megabagel.inference.text import TextSettings, decode  # noqa: E402
from megabagel.models.build import build_stages  # noqa: E402
from megabagel.models.flow import FlowTokens  # noqa: E402
from megabagel.models.routing import route  # noqa: E402
from megabagel.packing.chunk import chunk_of  # noqa: E402
from megabagel.packing.geometry import SpecialTokens, geometry_of  # noqa: E402
from megabagel.packing.planner import build_plan  # noqa: E402
from megabagel.packing.sample import Item, Sample  # noqa: E402
from megabagel.packing.splits import plan_sample  # noqa: E402
from megabagel.runtime import distributed  # noqa: E402

GUIDANCE = Guidance(text_scale=4.0, image_scale=1.0, interval=(0.0, 1.0))


def build() -> Network:
    """A model of the demo's shape with random weights."""
    config = dataclasses.replace(
        load_config(["--config", "demo"]), parallel=ParallelConfig(), checkpoint=CheckpointConfig()
    )
    (stage,) = build_stages(config, distributed.initialize(config.parallel, 0).device)
    load_weights([stage], open_source(config))
    torch.nn.init.normal_(stage.heads.llm2vae.weight, std=0.05)  # it starts from zero, which would hide differences
    return Network(stage.eval(), geometry_of(config.model, SpecialTokens(1, 2, 3, 4)))


class Pack:
    """Samples in one pass without a cache; the plan is made once."""

    def __init__(self, network: Network, samples: list[list[Item]]):
        self.network, stage = network, network.stage
        planned = [plan_sample(Sample(of, (n,), "bench", "bench"), network.geometry) for n, of in enumerate(samples)]
        self.plan = build_plan(planned, network.geometry, 1)
        shape = stage.config.kv_channels, stage.model_config.rotary_base
        self.routing = route(
            self.plan, chunk_of(self.plan, 0, 1), 0, 1, *shape, "sdpa", network.device, stage.config.params_dtype
        )

    @torch.no_grad()
    def run(self, time: float, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Final rows of both streams."""
        stage, routing = self.network.stage, self.routing
        flow = FlowTokens(latents.new_full((len(latents),), time), latents)
        hidden = stage.embeddings(routing.plan, routing.chunk, flow, None)
        hidden = stage.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=routing)
        return stage.heads.final_hidden(hidden, routing)


def pictures_cached(network: Network, prompts: list[list[int]], noise: Tensor, settings: FlowSettings) -> Tensor:
    """Latent tokens [pictures, n, d]."""
    contexts, special = [network.empty_context() for _ in prompts], network.geometry.special_tokens
    network.read_tokens(contexts, [[special.bos, *ids, special.eos] for ids in prompts])
    side = network.geometry.max_latent_size
    pairs = zip(contexts, noise, strict=True)
    canvases = [Canvas(context, network.empty_context(), None, (side, side), of) for context, of in pairs]
    return torch.stack(denoise(network, canvases, settings))


def pictures_plain(network: Network, prompts: list[list[int]], noise: Tensor, settings: FlowSettings) -> Tensor:
    """The same, prompt and picture together in every step."""
    side = network.geometry.max_latent_size * network.geometry.latent_stride
    picture = Item("vae_image", loss=True, size=(side, side))
    pack = Pack(network, [[Item("text", text_ids=ids), picture] for ids in prompts] + [[picture]] * len(prompts))
    latents, times = noise, flow_schedule(settings).tolist()
    for t, following in zip(times, times[1:], strict=False):
        _, gen = pack.run(t, torch.cat([latents, latents]).flatten(0, 1))
        found = network.velocity(gen[: len(pack.plan.gen_index)]).unflatten(0, (2, *noise.shape[:2]))
        velocity = torch.stack([guide(v, bare, None, GUIDANCE) for v, bare in zip(*found, strict=True)])
        latents = latents - velocity * (t - following)
    return latents


def text_cached(network: Network, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy continuations, ended early by the end token as in use."""
    contexts, special = [network.empty_context() for _ in prompts], network.geometry.special_tokens
    network.read_tokens(contexts, [[special.bos, *ids, special.eos] for ids in prompts])
    return decode(network, contexts, TextSettings(max_tokens=tokens), [0] * len(prompts))


def text_plain(network: Network, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """The same, everything read again for every token; requests that have ended go on, and are cut afterwards."""
    texts, eos = [[] for _ in prompts], network.geometry.special_tokens.eos
    nothing = torch.empty(0, network.latent_width, device=network.device)
    for _ in range(tokens):
        pairs = zip(prompts, texts, strict=True)
        pack = Pack(network, [[Item("text", text_ids=p), Item("text", text_ids=t)] for p, t in pairs])
        und, _ = pack.run(0.0, nothing)
        last = pack.plan.sample_lens.cumsum(0) - 2  # the token before the closing one
        for text, token in zip(texts, network.logits(und[last]).argmax(dim=1).tolist(), strict=True):
            text.append(token)
    return [text[: text.index(eos)] if eos in text else text for text in texts]


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("prompt", 200, "tokens of a prompt"),
        ("steps", 50, "times of a picture"),
        ("tokens", 64, "of an answer"),
        ("repeats", 3, "timed runs of each, alternating"),
        ("threads", 2, "CPU threads"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="requests at once (1 8)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    network = build()
    settings = FlowSettings(options.steps, 3.0, GUIDANCE)
    ratios, units = {}, {}
    for batch in options.batch:
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(5, 1600, (batch, options.prompt), generator=generator).tolist()
        noise = torch.randn(batch, network.geometry.max_latent_size**2, network.latent_width, generator=generator)
        difference = pictures_cached(network, prompts, noise, settings)
        difference = difference - pictures_plain(network, prompts, noise, settings)
        written = text_cached(network, prompts, options.tokens)
        same = written == text_plain(network, prompts, options.tokens)
        print(f"batch {batch}: latents within {difference.abs().max():.1e} of each other, the same texts: {same}")
        runs = {
            ("pictures", "cached"): lambda p=prompts, n=noise: pictures_cached(network, p, n, settings),
            ("pictures", "plain"): lambda p=prompts, n=noise: pictures_plain(network, p, n, settings),
            ("tokens", "cached"): lambda p=prompts: text_cached(network, p, options.tokens),
            ("tokens", "plain"): lambda p=prompts: text_plain(network, p, options.tokens),
        }
        seconds = {key: [] for key in runs}
        for _ in range(options.repeats):
            for key, run in runs.items():
                seconds[key].append(timed(run))
        for (what, way), values in seconds.items():
            made = batch if what == "pictures" else sum(map(len, written))
            rates = [made / value for value in values]
            print(f"batch {batch}, {way}: {median(rates):.2f} {what}/s ({min(rates):.2f} to {max(rates):.2f})")
            ratios[f"{what}/s, batch {batch}, {way}"] = median(rates)
            units[f"{what}/s, batch {batch}, {way}"] = "1/s"
        for what in ("pictures", "tokens"):
            name = f"{what}, batch {batch}, cached against plain"
            ratios[name] = median(seconds[what, "plain"]) / median(seconds[what, "cached"])
            units[name] = "ratio"
    distributed.destroy()
    print(json.dumps({"bench": "generate", "ratios": {k: round(v, 3) for k, v in ratios.items()}, "units": units}))


if __name__ == "__main__":
    main()
