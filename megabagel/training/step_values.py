"""What a step measured, by the names of `metrics.jsonl`: what every step has at hand, and what is gathered for the log.

The second part costs one sum and one maximum over all ranks and a pass over parameters and gradients; its own time is
among its values.
"""

import time

from megatron.core.optimizer import MegatronOptimizer

from megabagel.config.schema import Config
from megabagel.runtime.distributed import Layout
from megabagel.training import memory, norms
from megabagel.training.ema import ShardedEma
from megabagel.training.step import LossCounts, Losses
from megabagel.training.step_content import OFFICIAL, bubble_share, padding_share, total_flops

Values = dict[str, float | None]


def at_hand(
    config: Config, layout: Layout, counts: LossCounts, contents: list[dict[str, float]], losses: Losses, times: Values
) -> Values:
    """Known on every rank without asking another one; `losses` on the last stage. `contents`: of this replica's packs,
    from `step_content`; `counts` holds their sums over all replicas."""
    content, seconds = counts.content, times["step_time"] * layout.world_size
    flops = {name: value for name, value in content.items() if name.startswith("flops/")}
    return {
        "ce": losses.ce,
        "mse": losses.mse,
        "tokens_per_sec": counts.tokens / times["step_time"],
        "tflops_per_device": total_flops(content) / seconds / 1e12,
        "official_tflops_per_device": content[OFFICIAL] / seconds / 1e12,
        "tokens": counts.tokens,
        "ce_tokens": counts.ce_tokens,
        "mse_tokens": counts.mse_tokens,
        "samples": counts.samples,
        **{name: value for name, value in content.items() if name.startswith("tokens/")},
        "padding_share": padding_share(content),
        "bubble_share": bubble_share([total_flops(each) for each in contents], config.parallel),
        **flops,
        **times,
    }


def gathered(
    config: Config, layout: Layout, optimizer: MegatronOptimizer, ema: ShardedEma | None, grad_norm: float
) -> Values:
    """Equal on all ranks but for `log_time`, seconds that this takes; every rank must call it after
    `optimizer.step()`, which returned `grad_norm`."""
    start = time.perf_counter()
    found = norms.measure(optimizer, ema, config.model.layer_variant, config.optimizer.clip_grad, grad_norm)
    bytes_taken = memory.fullest(layout.device)
    return {
        "params_norm": found.parameters,
        "ema_distance": found.ema_distance,
        **{f"grad_norm/{part}": value for part, value in found.gradients.items()},
        **bytes_taken,
        "log_time": time.perf_counter() - start,
    }


def not_gathered() -> Values:
    """The same names on steps that are not shown."""
    names = ("params_norm", "ema_distance", *(f"grad_norm/{part}" for part in norms.PARTS))
    return dict.fromkeys((*names, "host_memory_bytes", "memory_bytes", "reserved_bytes", "log_time"))
