"""Pictures out of contexts: Euler steps of the rectified flow from noise to clean latent tokens, many pictures at once.

All branches of all pictures go through the model in one pass per step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megabagel.config.errors import ConfigError
from megabagel.inference.context import Context
from megabagel.inference.guidance import Guidance, guide
from megabagel.inference.network import Network
from megabagel.inference.rows import picture
from megabagel.models.flow import shift_times
from megabagel.packing.splits import VAE


@dataclass(frozen=True)
class FlowSettings:
    """How a picture is made."""

    num_timesteps: int = 50  # times from 1 to 0, so one step less
    timestep_shift: float = 3.0  # above 1: smaller steps while there is much noise
    guidance: Guidance = field(default_factory=Guidance)

    def __post_init__(self) -> None:
        if self.num_timesteps < 2:
            raise ConfigError(f"num_timesteps {self.num_timesteps} is too small: a picture takes at least 2 times.")
        if not self.timestep_shift > 0:
            raise ConfigError(f"timestep_shift {self.timestep_shift} must be above 0; 1 changes nothing.")


@dataclass(frozen=True)
class Canvas:
    """One picture to be made. The contexts are only looked at; branches are None where nothing is to be compared."""

    context: Context
    without_text: Context | None
    without_pictures: Context | None
    grid: tuple[int, int]  # rows and columns, in latent tokens
    noise: Tensor  # [rows * columns, d] N(0, 1)


def flow_schedule(settings: FlowSettings) -> Tensor:
    """float32 [num_timesteps], from 1 to 0."""
    return shift_times(torch.linspace(1, 0, settings.num_timesteps), settings.timestep_shift)


# number of the step, its time, latent tokens entering it and velocities, of every picture
StepReport = Callable[[int, float, list[Tensor], list[Tensor]], None]


def denoise(
    network: Network,
    canvases: Sequence[Canvas],
    settings: FlowSettings,
    on_step: StepReport = lambda *_: None,
) -> list[Tensor]:
    """Clean latent tokens float32 [rows * columns, d] of each picture."""
    plain = _Branches(network, canvases, None)
    guided = _Branches(network, canvases, settings.guidance)
    latents = [canvas.noise.to(network.device, torch.float32) for canvas in canvases]
    times = flow_schedule(settings).tolist()
    embedded = network.embed(times).split(1)
    for number, (time, following) in enumerate(zip(times, times[1:], strict=False)):
        branches = guided if settings.guidance.acts_at(time) else plain
        velocities = branches.velocities(latents, embedded[number])
        on_step(number, time, latents, velocities)
        latents = [x - v * (time - following) for x, v in zip(latents, velocities, strict=True)]
    return latents


class _Branches:
    """The contexts of a step, and what their velocities become. Without `guidance` only the main branch is run."""

    def __init__(self, network: Network, canvases: Sequence[Canvas], guidance: Guidance | None):
        self.network, self.guidance = network, guidance
        self.contexts: list[Context] = []
        self.canvas_of: list[int] = []
        self.places: list[list[int | None]] = []  # of each canvas: main, without text, without pictures
        for number, canvas in enumerate(canvases):
            wanted = [canvas.context, None, None]
            if guidance is not None:
                wanted[1] = canvas.without_text if guidance.text_scale != 1 else None
                wanted[2] = canvas.without_pictures if guidance.image_scale != 1 else None
            self.places.append([None if context is None else self._place(context, number) for context in wanted])
        grids = [canvases[number].grid for number in self.canvas_of]
        self.step = network.prepare(self.contexts, [picture(VAE, grid) for grid in grids])

    def _place(self, context: Context, canvas: int) -> int:
        for place, (known, number) in enumerate(zip(self.contexts, self.canvas_of, strict=True)):
            if known is context and number == canvas:
                return place
        self.contexts.append(context)
        self.canvas_of.append(canvas)
        return len(self.contexts) - 1

    def velocities(self, latents: list[Tensor], time: Tensor) -> list[Tensor]:
        """Of each picture, from its latent tokens at an embedded time [1, hidden]."""
        tokens = torch.cat([latents[number] for number in self.canvas_of])
        hidden = self.step.run(time, tokens, None)
        found = self.network.velocity(torch.cat(hidden.gen)).split([len(rows) for rows in hidden.gen])
        branches = [[None if place is None else found[place] for place in places] for places in self.places]
        return [main if self.guidance is None else guide(main, *others, self.guidance) for main, *others in branches]
