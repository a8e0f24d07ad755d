"""Text out of contexts, one token after the other, many contexts at once.

A draw depends on the seed and the number of the token alone, so what else is in the batch changes nothing.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megabagel.config.errors import ConfigError
from megabagel.inference.context import Context
from megabagel.inference.network import Network
from megabagel.runtime import rng


@dataclass(frozen=True)
class TextSettings:
    """How tokens are chosen."""

    max_tokens: int = 512
    temperature: float = 0.0  # 0: always the most likely token
    top_p: float = 1.0  # only the most likely tokens that together reach this probability

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens {self.max_tokens} is too small: a text may have at least 1 token.")
        if not self.temperature >= 0:
            raise ConfigError(f"temperature {self.temperature} must be at least 0, which always takes the likeliest.")
        if not 0 <= self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p} is a probability: from 0 to 1.")


# new token of each context, None for those that have ended -> those that shall end now; None: none shall
TokenReport = Callable[[list[int | None]], Collection[int] | None]


def choose(logits: Tensor, settings: TextSettings, seed: int, number: int) -> int:
    """Id of token `number` from its scores, float [vocabulary]."""
    if settings.temperature == 0:
        return int(logits.argmax())
    probabilities, ids = torch.softmax(logits.double() / settings.temperature, dim=-1).sort(descending=True)
    reached = probabilities.cumsum(0)
    kept = int((reached < settings.top_p).sum()) + 1  # nucleus sampling, Holtzman et al. 2020
    reached = reached[:kept]
    draw = float(rng.uniform(seed, "token", (number,))) * float(reached[-1])
    return int(ids[min(int((reached <= draw).sum()), len(reached) - 1)])


def decode(
    network: Network,
    contexts: Sequence[Context],
    settings: TextSettings,
    seeds: Sequence[int],
    on_tokens: TokenReport = lambda _: None,
) -> list[list[int]]:
    """Texts that continue `contexts`, frame tokens not included; each ends with the end token or `max_tokens`.

    A context has read its text afterwards, framed as every text is. `on_tokens` hears of every token and may end texts.
    """
    special = network.geometry.special_tokens
    texts: list[list[int]] = [[] for _ in contexts]
    fed = [[special.bos] for _ in contexts]
    going = list(range(len(contexts)))
    while going:
        hidden = network.read_tokens([contexts[n] for n in going], [fed[n] for n in going])
        scores = network.logits(torch.stack([rows[-1] for rows in hidden]))
        new: list[int | None] = [None] * len(contexts)
        for n, logits in zip(going, scores, strict=True):
            token = choose(logits, settings, seeds[n], len(texts[n]))
            fed[n] = [token]
            if token != special.eos:
                new[n] = token
                texts[n].append(token)
        ended = on_tokens(new) or ()
        going = [n for n in going if new[n] is not None and n not in ended and len(texts[n]) < settings.max_tokens]
    ends = [tokens if tokens == [special.eos] else [*tokens, special.eos] for tokens in fed]
    network.read_tokens(contexts, ends)
    return texts
