"""The saved inference runs of a case against `megabagel.inference`: cached contexts, greedy text, guided pictures.

Every rank runs it on its model.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megabagel.config.schema import ParallelConfig
from megabagel.inference.context import Context
from megabagel.inference.flow import Canvas, FlowSettings, denoise, flow_schedule
from megabagel.inference.guidance import Guidance
from megabagel.inference.network import Network
from megabagel.inference.pictures import from_latents, to_latents, to_patches, to_pixels
from megabagel.inference.text import TextSettings, decode
from megabagel.models.autoencoder import Autoencoder, load_autoencoder, unpatchify
from megabagel.models.bagel import Bagel
from megabagel.packing.geometry import Geometry, SpecialTokens
from parity.case import Case
from parity.compare import Report, compare

_RUNS = ("t2i", "t2i_nocfg", "edit", "edit_channel", "edit_text_channel")
_INPUTS = {"image", "vae_image", "vit_image", "prompt_ids", "init_noise", "cond_posterior_noise"}


@dataclass
class InferValues:
    """What was computed, by the name of what is expected, and places in contexts by their path in meta.inference."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # tokens read, next RoPE id


def is_for_inference(parallel: ParallelConfig) -> bool:
    """Whether a rank's model can be asked for predictions: no pipeline, and no MLPs on other ranks only."""
    return parallel.pipeline_model_parallel_size == parallel.expert_model_parallel_size == 1


def run_inference(case: Case, stage: Bagel) -> InferValues:
    """Everything `infer.*` of a case that has it, on a model with the weights of its checkpoint."""
    special, model = case.meta["special_token_ids"], stage.model_config
    geometry = Geometry(
        latent_stride=model.vae.downsample * model.latent_patch_size,
        max_latent_size=model.max_latent_size,
        vit_patch_size=model.vit.patch_size,
        vit_max_num_patch_per_side=model.vit.max_num_patch_per_side,
        special_tokens=SpecialTokens(
            special["bos_token_id"], special["eos_token_id"], special["start_of_image"], special["end_of_image"]
        ),
        interpolate_pos=model.interpolate_pos,
    )
    run = _Run(case, Network(stage, geometry))
    if "infer.und.tokens" in case.expected:
        run.understand()
    for name in _RUNS:
        if f"infer.{name}.latent_tokens" in case.expected:
            run.draw(name)
    return run.values


class _Run:
    def __init__(self, case: Case, network: Network):
        self.case, self.network = case, network
        self.values = InferValues()
        self.autoencoder: Autoencoder = load_autoencoder(case.checkpoint).to(network.device)

    def _expected(self, name: str) -> Tensor:
        return self.case.expected[f"infer.{name}"]

    def _place(self, path: str, context: Context) -> None:
        self.values.places[path] = context.length, context.rope

    def understand(self) -> None:
        network, values = self.network, self.values
        context = network.empty_context()
        self._read_vit(context, self._expected("und.image"))
        self._place("und.after_image", context)
        network.read_tokens([context], [self._expected("und.prompt_ids").tolist()])
        self._place("und.after_text", context)
        if self.network.stage.cp_size == 1:  # else a rank's cache holds copies of some heads
            values.tensors["und.prefill_key_cache"] = _all_heads(context.cache.keys())
        tokens = self._expected("und.tokens").tolist()
        (found,) = decode(network, [context.fork()], TextSettings(max_tokens=len(tokens) - 1), [0])
        values.tensors["und.tokens"] = torch.tensor([network.geometry.special_tokens.bos, *found])
        rows = [network.read_tokens([context], [[token]])[0] for token in tokens]
        values.tensors["und.logits"] = network.logits(torch.cat(rows)).cpu()

    def draw(self, name: str) -> None:
        args = self.case.meta["inference"][name]["args"]
        guidance = Guidance(
            args["cfg_text_scale"],
            args["cfg_img_scale"],
            tuple(args["cfg_interval"]),
            args["cfg_renorm_type"],
            args["cfg_renorm_min"],
        )
        settings = FlowSettings(args["num_timesteps"], args["timestep_shift"], guidance)
        kind = name.split("_")[0]
        branches = self._contexts(kind)
        for path, context in zip(("gen", "cfg_text", "cfg_img"), branches, strict=True):
            self._place(f"{name}.{path}", context)
        height, width = self.case.meta["inference"][name]["image_hw"]
        stride, patch = self.network.geometry.latent_stride, self.network.stage.model_config.latent_patch_size
        grid = height // stride, width // stride
        entering, velocities = [], []

        def on_step(_number: int, _time: float, latents: list[Tensor], found: list[Tensor]) -> None:
            entering.append(latents[0].cpu())
            velocities.append(found[0].cpu())

        canvas = Canvas(*branches, grid, self._expected(f"{kind}.init_noise"))
        (tokens,) = denoise(self.network, [canvas], settings, on_step)
        decoded = from_latents(self.autoencoder, tokens, grid, patch).cpu()
        found = {
            "timesteps": flow_schedule(settings)[:-1],
            "x_t": torch.stack(entering),
            "v_t": torch.stack(velocities),
            "latent_tokens": tokens.cpu(),
            "latent": unpatchify(tokens, grid[0] * patch, grid[1] * patch, patch)[None].cpu(),
            "image_float": decoded,
            "image_uint8": torch.from_numpy(to_pixels(decoded)),
        }
        self.values.tensors |= {f"{name}.{key}": value for key, value in found.items()}

    def _contexts(self, kind: str) -> tuple[Context, Context, Context]:
        """With everything, without the prompt, without pictures."""
        whole, no_pictures = self.network.empty_context(), self.network.empty_context()
        if kind == "edit":
            patch = self.network.stage.model_config.latent_patch_size
            noise = self._expected("edit.cond_posterior_noise")[0]
            tokens, grid = to_latents(self.autoencoder, self._expected("edit.vae_image"), noise, patch)
            latent = unpatchify(tokens, grid[0] * patch, grid[1] * patch, patch)[None].cpu()
            self.values.tensors["edit.cond_latent"] = latent
            self.network.read_latents([whole], [tokens], [grid])
            self._read_vit(whole, self._expected("edit.vit_image"))
        no_text = whole.fork()
        prompt = self._expected(f"{kind}.prompt_ids").tolist()
        self.network.read_tokens([whole, no_pictures], [prompt, prompt])
        return whole, no_text, no_pictures

    def _read_vit(self, context: Context, pixels: Tensor) -> None:
        patches, grid = to_patches(pixels, self.network.geometry.vit_patch_size)
        self.network.read_vit([context], [patches], [grid])


def _all_heads(keys: Tensor) -> Tensor:
    """[layers, length, this rank's kv heads, d] -> of all tensor-parallel ranks, on the CPU."""
    group = parallel_state.get_tensor_model_parallel_group()
    shards = [torch.empty_like(keys) for _ in range(group.size())]
    dist.all_gather(shards, keys.contiguous(), group=group)
    return torch.cat(shards, dim=2).cpu()


def judge_inference(case: Case, values: InferValues, report: Report, tolerance: float) -> None:
    """Tensors within `tolerance`; tokens, lengths and positions must be the same."""
    group = report.group("infer", tolerance)
    for key, expected in case.expected.items():
        name = key.removeprefix("infer.")
        if not key.startswith("infer.") or name.split(".")[1] in _INPUTS:
            continue
        if name == "und.prefill_key_cache" and name not in values.tensors:
            continue
        found = values.tensors.get(name)
        if expected.is_floating_point():
            compare(group, key, found, expected)
        else:
            # colours are cut off to whole numbers, which rounding moves a value across: one more or less is the same
            least = 1 if name.endswith("image_uint8") else 0
            same = found.shape == expected.shape and (found.int() - expected.int()).abs().max() <= least
            group.add(key, 0.0 if same else 1.0)
    for path, (length, rope) in values.places.items():
        run, name = path.split(".")
        place = case.meta["inference"][run][name]
        group.add(f"meta.inference.{path}", 0.0 if ([length], [rope]) == (place["kv_lens"], place["ropes"]) else 1.0)
        if name == "gen":
            times = torch.tensor(case.meta["inference"][run]["timesteps"])
            compare(group, f"meta.inference.{run}.timesteps", values.tensors[f"{run}.timesteps"], times)
