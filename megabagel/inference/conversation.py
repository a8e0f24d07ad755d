"""What a model and its user have said and shown, as contexts: the whole, and the two that guidance compares with.

Conversations are read side by side: what comes at the same place of several goes through the model in one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from megabagel.data.text import Tokenizer
from megabagel.inference.context import Context
from megabagel.inference.network import Network
from megabagel.inference.pictures import to_latents, to_patches
from megabagel.inference.sizes import PictureSizes
from megabagel.models.autoencoder import Autoencoder
from megabagel.runtime import rng

Part = str | Image.Image


@dataclass
class Conversation:
    """The two branches are None where no picture will be made."""

    seed: int
    context: Context
    without_text: Context | None = None  # all but the text that came last
    texts_only: Context | None = None  # no pictures, and no text of the model's own
    shown: Image.Image | None = None  # the last picture
    pictures: int = 0  # shown and made so far; numbers the draws of noise

    @property
    def without_pictures(self) -> Context | None:
        """The branch that image guidance compares with; None without a picture."""
        return None if self.shown is None else self.texts_only


@dataclass(frozen=True)
class Reader:
    """Lets conversations read. `autoencoder`: None for a model that makes no pictures."""

    network: Network
    tokenizer: Tokenizer
    autoencoder: Autoencoder | None
    sizes: PictureSizes

    def open(self, seed: int, draws: bool) -> Conversation:
        """One in which nothing was said. `draws`: the model will be asked for pictures."""
        empty = self.network.empty_context
        return Conversation(seed, empty(), empty(), empty()) if draws else Conversation(seed, empty())

    def read(self, conversations: Sequence[Conversation], parts: Sequence[Sequence[Part]]) -> None:
        """Each conversation reads its parts in order."""
        for place in range(max(map(len, parts), default=0)):
            here = [(c, of[place]) for c, of in zip(conversations, parts, strict=True) if place < len(of)]
            self.show([(c, part) for c, part in here if not isinstance(part, str)])
            self.tell([(c, part) for c, part in here if isinstance(part, str)])

    def tell(self, said: Sequence[tuple[Conversation, str]]) -> None:
        """Each conversation reads a text."""
        special = self.network.geometry.special_tokens
        contexts, ids = [], []
        for conversation, text in said:
            framed = [special.bos, *self.tokenizer.encode(text), special.eos]
            if conversation.without_text is not None:
                conversation.without_text = conversation.context.fork()
            for context in (conversation.context, conversation.texts_only):
                if context is not None:
                    contexts.append(context)
                    ids.append(framed)
        if contexts:
            self.network.read_tokens(contexts, ids)

    def show(self, shown: Sequence[tuple[Conversation, Image.Image]]) -> None:
        """Each conversation sees a picture: as latents where pictures will be made, then through the ViT."""
        drawing = [(c, image) for c, image in shown if c.texts_only is not None]
        if drawing:
            pairs = [self._latents(c, image) for c, image in drawing]
            self.network.read_latents([c.context for c, _ in drawing], *map(list, zip(*pairs, strict=True)))
        if shown and self.network.stage.vision is not None:
            patch = self.network.geometry.vit_patch_size
            pairs = [to_patches(self.sizes.for_vit(image), patch) for _, image in shown]
            self.network.read_vit([c.context for c, _ in shown], *map(list, zip(*pairs, strict=True)))
        for conversation, image in shown:
            conversation.shown = image
            conversation.pictures += 1
            if conversation.without_text is not None:
                conversation.without_text = conversation.context.fork()

    def _latents(self, conversation: Conversation, image: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        pixels = self.sizes.for_latents(image)
        stride = self.autoencoder.config.downsample
        shape = (self.autoencoder.config.z_channels, pixels.shape[0] // stride, pixels.shape[1] // stride)
        noise = torch.from_numpy(rng.normal(conversation.seed, "posterior", (conversation.pictures,), shape))
        return to_latents(self.autoencoder, pixels, noise, self.network.stage.model_config.latent_patch_size)
