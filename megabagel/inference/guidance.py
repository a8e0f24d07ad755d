"""Classifier-free guidance of the velocity (Ho and Salimans 2022) by text and by pictures, with BAGEL's limits on its
length. Pure functions of one picture's velocities."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from megabagel.config.errors import ConfigError

Renorm = Literal["global", "channel", "text_channel"]


@dataclass(frozen=True)
class Guidance:
    """How far predictions are pushed away from what the model predicts without the prompt, or without pictures."""

    text_scale: float = 4.0  # 1: off
    image_scale: float = 1.5  # 1: off
    interval: tuple[float, float] = (0.4, 1.0)  # times lo < t <= hi at which there is guidance
    # a guided velocity is never longer than the unguided one: over the whole picture, in each token, or in each token
    # after guidance by text only
    renorm: Renorm = "global"
    renorm_min: float = 0.0  # the least factor that a length is multiplied by

    def __post_init__(self) -> None:
        if self.renorm not in get_args(Renorm):
            raise ConfigError(f"renorm {self.renorm} is unknown: allowed are {', '.join(get_args(Renorm))}.")
        if not 0 <= self.renorm_min <= 1:
            raise ConfigError(f"renorm_min {self.renorm_min} is a factor: from 0 to 1.")

    def acts_at(self, time: float) -> bool:
        """Whether there is guidance at this time."""
        return self.interval[0] < time <= self.interval[1]


def guide(velocity: Tensor, without_text: Tensor | None, without_pictures: Tensor | None, guidance: Guidance) -> Tensor:
    """float32 [n, d] each, None where a branch is off -> the guided velocity [n, d]."""
    guided = velocity
    if without_text is not None:
        guided = without_text + guidance.text_scale * (guided - without_text)
    if guidance.renorm == "text_channel":
        guided = _limited(guided, velocity, True, guidance.renorm_min)
    if without_pictures is not None:
        guided = without_pictures + guidance.image_scale * (guided - without_pictures)
    if guidance.renorm != "text_channel":
        guided = _limited(guided, velocity, guidance.renorm == "channel", guidance.renorm_min)
    return guided


def _limited(guided: Tensor, velocity: Tensor, per_token: bool, least: float) -> Tensor:
    """`guided` shortened to the length of `velocity`, if it is longer, but by no factor below `least`."""
    dims = {"dim": -1, "keepdim": True} if per_token else {}
    return guided * (velocity.norm(**dims) / (guided.norm(**dims) + 1e-8)).clamp(min=least, max=1.0)
