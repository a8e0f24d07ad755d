"""Memory of a layout's fullest GPU, part by part."""

from dataclasses import dataclass, fields

from layouts.activation_formula import FLOAT32, held
from layouts.memory_formula import memory_of_ranks
from layouts.traffic_formula import Load

from megabagel.config.schema import Config

_AUTOENCODER = 84e6 * 2  # FLUX's encoder and decoder in bf16, on every rank
_ENCODED_PIXELS = 1024**2  # the largest picture
_FULL_SIZE_TENSORS = 4  # of the autoencoder's first level that live together


@dataclass(frozen=True)
class Budget:
    """Bytes on one GPU. `optimizer` holds the fp32 main parameters, `moments` Adam's two."""

    weights: float
    gradients: float
    optimizer: float
    moments: float
    average: float
    activations: float
    logits: float
    workspace: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def budget(config: Config, processes: int, load: Load, reserve: float) -> Budget:
    """Of the GPU that needs most. `reserve`: bytes for the CUDA context, NCCL and what the allocator cannot use."""
    ranks = [
        _of_rank(config, state, held_there, reserve)
        for stage, holders in zip(
            memory_of_ranks(config.model, config.parallel, processes), held(config, processes, load), strict=True
        )
        for state, held_there in zip(stage, holders, strict=True)
    ]
    return max(ranks, key=lambda rank: rank.total)


def _of_rank(config: Config, state, held_there, reserve: float) -> Budget:
    main = state.optimizer / 3
    model = config.model
    pixels = _ENCODED_PIXELS * model.vae.ch * 2 * _FULL_SIZE_TENSORS if model.visual_gen else 0
    # Adam without Apex or Transformer Engine makes a temporary as large as the rank's main parameters; neither it nor
    # the pictures' encoding meets the activations
    apart = max(0.0, max(main / 4 * FLOAT32, pixels) - held_there.total)
    return Budget(
        weights=state.parameters,
        gradients=state.gradients,
        optimizer=main,
        moments=2 * main,
        average=state.average if config.optimizer.ema_decay is not None else 0.0,
        activations=held_there.layers + held_there.ends,
        # only the larger of the two is there at a time
        logits=held_there.logits if held_there.logits >= held_there.workspace else 0.0,
        workspace=held_there.workspace if held_there.workspace > held_there.logits else 0.0,
        buffers=reserve + apart + (_AUTOENCODER if model.visual_gen else 0),
    )
