"""Norms of gradients by part of the model, of parameters and their moving average; one sum over all ranks for all.

Works on the distributed optimizer's float32 shards, so nothing is gathered. Clipping is the optimizer's own matter.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megabagel.training.ema import ShardedEma

PARTS = ("und", "gen", "shared", "vocabulary", "connectors", "vit")


@dataclass(frozen=True)
class Norms:
    """L2 norms over all trainable parameters, replicated ones counted once; the same on all ranks."""

    gradients: dict[str, float | None]  # by PARTS, before clipping; None: nothing of that part trains
    parameters: float
    ema_distance: float | None  # ||average - parameters|| / ||parameters||; None without an average


@dataclass(frozen=True)
class Shard:
    """What this rank updates of one parameter."""

    part: str
    parameter: Tensor
    main: Tensor  # float32 [n], its gradient beside it


def shards(optimizer: MegatronOptimizer, layer_variant: str) -> Iterator[Shard]:
    """This rank's shards of an optimizer of `build_optimizer`, replicas on other ranks left out."""
    names = {p: name for chunk in optimizer.model_chunks for name, p in chunk.module.named_parameters()}
    for each in optimizer.chained_optimizers:
        if each.is_stub_optimizer:
            continue
        for parameter, (group, order) in each.model_param_group_index_map.items():
            main = each.optimizer.param_groups[group]["params"][order]
            if param_is_not_shared(main) and param_is_not_tensor_parallel_duplicate(main):
                yield Shard(part_of(names[parameter], layer_variant), parameter, main)


def part_of(name: str, layer_variant: str) -> str:
    """Which of PARTS a parameter of `models/bagel.py` belongs to.

    `und`, `gen`: the streams' own weights in the decoder's layers and the final norms; `shared`: of both streams there,
    see `model.layer_variant`; `vocabulary`: embedding and head; `connectors`: between the decoder and pictures.
    """
    if name.startswith("vision."):
        return "vit"
    if "word_embeddings" in name or "lm_head" in name:
        return "vocabulary"
    if name.startswith("embeddings.") or "llm2vae" in name:
        return "connectors"
    if layer_variant == "dense" or (layer_variant == "moe" and "decoder.layers." in name and ".mlp." not in name):
        return "shared"
    return "gen" if ".gen." in name or ".gen_norm." in name else "und"


@torch.no_grad()
def measure(
    optimizer: MegatronOptimizer, ema: ShardedEma | None, layer_variant: str, clip_grad: float, grad_norm: float
) -> Norms:
    """After `optimizer.step()`, which returned `grad_norm`; every rank must call it."""
    own = list(shards(optimizer, layer_variant))
    averages = ema.by_parameter() if ema else {}
    squares = [_squares([s.main.grad for s in own if s.part == part and s.main.grad is not None]) for part in PARTS]
    squares.append(_squares([s.main for s in own]))
    squares.append(_squares_of_distances([(averages[s.parameter][0], s.main) for s in own] if ema else []))
    present = [float(any(s.part == part for s in own)) for part in PARTS]
    device = next(optimizer.model_chunks[0].parameters()).device
    total = torch.cat([torch.stack([s.to(device) for s in squares]), torch.tensor(present, device=device)])
    dist.all_reduce(total)
    *roots, parameters, distance = total[: len(squares)].sqrt().tolist()
    unclipped = max(1.0, (grad_norm + 1e-6) / clip_grad) if clip_grad > 0 else 1.0
    gradients = {
        part: unclipped * root if held else None
        for part, root, held in zip(PARTS, roots, total[len(squares) :].tolist(), strict=True)
    }
    return Norms(gradients, parameters, distance / max(parameters, 1e-30) if ema else None)


def _squares(tensors: list[Tensor]) -> Tensor:
    """Sum of the squares of all values, float64 []."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(torch._foreach_norm([t.float() for t in tensors])).double().square().sum()


def _squares_of_distances(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of the differences; float64 []. One at a time: together they are as large as the parameters."""
    total = torch.zeros((), dtype=torch.float64)
    for one, other in pairs:
        total = total.to(one.device) + torch.linalg.vector_norm(one - other).double().square()
    return total
