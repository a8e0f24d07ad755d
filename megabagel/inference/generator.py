"""A model in use: answers to questions, pictures from prompts, edits, and both in turn; many requests at once.

from megabagel.inference import load
bagel = load("BAGEL-7B-MoT")
bagel.pictures(["A blue house beside a lake."])[0].image.save("house.png")
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image

from megabagel.config.errors import ConfigError
from megabagel.data.text import Tokenizer
from megabagel.inference.conversation import Conversation, Part, Reader
from megabagel.inference.flow import Canvas, FlowSettings, denoise
from megabagel.inference.network import Network
from megabagel.inference.pictures import from_latents, to_pixels
from megabagel.inference.sizes import PictureSizes
from megabagel.inference.text import TextSettings, TokenReport, decode
from megabagel.models.autoencoder import Autoencoder
from megabagel.runtime import rng

Prompt = str | Sequence[Part]  # a text, or texts and pictures in the order in which they are read
Turn = Literal["text", "picture"]
WRITING, DRAWING = TextSettings(), FlowSettings()  # defaults
THINK_BEFORE_ANSWER = (
    "Before you answer, reason about the question step by step. Write your reasoning between <think> and </think>, and "
    "the answer behind it."
)
THINK_BEFORE_PICTURE = (
    "Before you make the picture, plan what it should show. Write your plan between <think> and </think>; the picture "
    "follows."
)


@dataclass(frozen=True)
class Drawn:
    """A picture, and what the model thought before it, if it was asked to."""

    image: Image.Image
    thought: str | None = None


class Generator:
    """`network` with what turns words and pixels into tokens and back; `load` makes one.

    Every rank of a model calls everything alike. Prompts of a call may differ in length, and pictures in size. `seeds`:
    one number per prompt, by default 0, 1, ...; the result for a prompt depends on its own alone.
    """

    def __init__(self, network: Network, tokenizer: Tokenizer, autoencoder: Autoencoder | None):
        self.network, self.tokenizer, self.autoencoder = network, tokenizer, autoencoder
        self.sizes = PictureSizes.of(network.geometry)
        self.reader = Reader(network, tokenizer, autoencoder, self.sizes)

    def answers(
        self,
        prompts: Sequence[Prompt],
        settings: TextSettings = WRITING,
        *,
        seeds: Sequence[int] | None = None,
        think: bool = False,
        system_prompt: str | None = None,
        on_tokens: TokenReport = lambda _: None,
    ) -> list[str]:
        """A text for each prompt. `think`: reasoning comes first, after `system_prompt` or the one for it here."""
        system = system_prompt or (THINK_BEFORE_ANSWER if think else None)
        return self._write(self._open(prompts, seeds, system, draws=False), settings, on_tokens)

    def pictures(
        self,
        prompts: Sequence[Prompt],
        settings: FlowSettings = DRAWING,
        *,
        height: int | None = None,
        width: int | None = None,
        seeds: Sequence[int] | None = None,
        think: bool = False,
        thinking: TextSettings = WRITING,
        system_prompt: str | None = None,
        on_tokens: TokenReport = lambda _: None,
        on_step: Callable[..., None] = lambda *_: None,
    ) -> list[Drawn]:
        """A picture for each prompt, of the size of the prompt's last picture if none is given (an edit). `think`: a
        plan of the picture is written first, by the settings `thinking`. Raises ConfigError for a size or a model that
        makes none."""
        system = system_prompt or (THINK_BEFORE_PICTURE if think else None)
        conversations = self._open(prompts, seeds, system, draws=True)
        thoughts = self._write(conversations, thinking, on_tokens) if think else [None] * len(conversations)
        images = self._draw(conversations, settings, height, width, on_step)
        return [Drawn(image, thought) for image, thought in zip(images, thoughts, strict=True)]

    def interleaved(
        self,
        prompts: Sequence[Prompt],
        turns: Sequence[Turn],
        settings: FlowSettings = DRAWING,
        writing: TextSettings = WRITING,
        *,
        height: int | None = None,
        width: int | None = None,
        seeds: Sequence[int] | None = None,
        system_prompt: str | None = None,
        on_tokens: TokenReport = lambda _: None,
        on_step: Callable[..., None] = lambda *_: None,
    ) -> list[list[Part]]:
        """For each prompt texts and pictures in the order of `turns`; each is read before the next one is made."""
        conversations = self._open(prompts, seeds, system_prompt, draws=True)
        made: list[list[Part]] = [[] for _ in conversations]
        for turn in turns:
            if turn == "text":
                parts = self._write(conversations, writing, on_tokens)
            else:
                parts = self._draw(conversations, settings, height, width, on_step)
                self.reader.show(list(zip(conversations, parts, strict=True)))
            for of_prompt, part in zip(made, parts, strict=True):
                of_prompt.append(part)
        return made

    def _open(
        self, prompts: Sequence[Prompt], seeds: Sequence[int] | None, system: str | None, draws: bool
    ) -> list[Conversation]:
        """Conversations that have read the prompts."""
        if draws and self.autoencoder is None:
            raise ConfigError("this model makes no pictures: it was trained with model.visual_gen false.")
        parts = [[prompt] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        seeds = range(len(parts)) if seeds is None else seeds
        conversations = [self.reader.open(seed, draws) for seed, _ in zip(seeds, parts, strict=True)]
        shows = any(not isinstance(part, str) for of in parts for part in of)
        if shows and not draws and self.network.stage.vision is None:
            raise ConfigError("this model sees no pictures: it was trained with model.visual_und false.")
        self.reader.read(conversations, [[system, *of] if system else of for of in parts])
        return conversations

    def _write(
        self,
        conversations: Sequence[Conversation],
        settings: TextSettings,
        on_tokens: TokenReport = lambda _: None,
    ) -> list[str]:
        contexts, seeds = [c.context for c in conversations], [c.seed for c in conversations]
        return [self.tokenizer.decode(ids) for ids in decode(self.network, contexts, settings, seeds, on_tokens)]

    def _draw(
        self,
        conversations: Sequence[Conversation],
        settings: FlowSettings,
        height: int | None,
        width: int | None,
        on_step: Callable[..., None],
    ) -> list[Image.Image]:
        canvases = []
        for conversation in conversations:
            grid = self.sizes.grid(height, width, conversation.shown)
            shape = (grid[0] * grid[1], self.network.latent_width)
            noise = torch.from_numpy(rng.normal(conversation.seed, "flow", (conversation.pictures,), shape))
            branches = conversation.context, conversation.without_text, conversation.without_pictures
            canvases.append(Canvas(*branches, grid, noise))
        patch = self.network.stage.model_config.latent_patch_size
        tokens = denoise(self.network, canvases, settings, on_step)
        return [
            Image.fromarray(to_pixels(from_latents(self.autoencoder, latents, canvas.grid, patch)))
            for latents, canvas in zip(tokens, canvases, strict=True)
        ]
