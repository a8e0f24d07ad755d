"""What a sample costs to train, from its layout alone: balanced packing makes these sums equal in a step's packs.

Plain numbers, so that workers get it by pickling. Which model they stand for is `training/cost_model.py`'s business.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megabagel.packing.plan import CAUSAL, NOISE
from megabagel.packing.splits import VAE, VIT, Piece, PlannedSample


@dataclass(frozen=True)
class CostModel:
    """FLOPs of a training step for each unit of work: forward pass, backward pass where something trains.

    A pair is a query and a key that it sees, in all layers together.
    """

    und_token: int  # text or ViT token in the decoder's layers
    gen_token: int  # VAE token in the decoder's layers
    und_pair: int  # the query's split holds no VAE token
    gen_pair: int  # it holds some
    ce_row: int  # a token that the vocabulary head reads
    mse_row: int  # a token that the latent head reads
    latent_token: int  # a VAE token on its way into the decoder
    connector_token: int  # the same of a ViT token
    vit_token: int  # a patch in the vision tower
    vit_pair: int  # two patches of one picture in the vision tower
    latent_pixel: int  # a latent pixel that the autoencoder makes
    latent_pixel_pair: int  # two latent pixels of one picture in its attention
    latent_pixels_per_token: int
    stored_latents: frozenset[str] = frozenset()  # groups whose pictures need no autoencoder
    stored_features: frozenset[str] = frozenset()  # groups whose pictures need no vision tower

    def cost(self, planned: PlannedSample) -> int:
        """FLOPs of one sample; those of a pack are the sum over its samples, padding left out."""
        return (
            self._attention(planned.pieces)
            + self._tokens(planned.pieces)
            + self._encoders(planned.pieces, planned.group)
        )

    def _attention(self, pieces: list[Piece]) -> int:
        """Each split sees what is not noised before it in the sample, then itself."""
        total = before = 0
        for mode, length, has_gen in _splits(pieces):
            pairs = length * (before + length)
            if mode == CAUSAL:
                pairs -= length * (length - 1) // 2
            total += pairs * (self.gen_pair if has_gen else self.und_pair)
            before += 0 if mode == NOISE else length
        return total

    def _tokens(self, pieces: list[Piece]) -> int:
        """Whatever grows with the number of tokens: the decoder's layers, connectors and heads."""
        und = gen = vit = ce = mse = 0
        for piece in pieces:
            body = piece.length - 2
            ce += piece.special_token_label is not None
            if piece.kind == VAE:
                und += 2  # start and end of the picture
                gen += body
                mse += body if piece.loss else 0
                continue
            und += piece.length
            if piece.kind == VIT:
                vit += body
            elif piece.loss:
                ce += piece.length - 1
        heads = ce * self.ce_row + mse * self.mse_row
        inputs = gen * self.latent_token + vit * self.connector_token
        return und * self.und_token + gen * self.gen_token + heads + inputs

    def _encoders(self, pieces: list[Piece], group: str) -> int:
        """The vision tower and the autoencoder, picture by picture."""
        total = 0
        has_latents, has_features = group in self.stored_latents, group in self.stored_features
        for piece in pieces:
            body = piece.length - 2
            if piece.kind == VIT and not has_features:
                total += body * (self.vit_token + body * self.vit_pair)
            elif piece.kind == VAE and not has_latents:
                pixels = body * self.latent_pixels_per_token
                total += pixels * (self.latent_pixel + pixels * self.latent_pixel_pair)
        return total


def _splits(pieces: list[Piece]) -> Iterator[tuple[int, int, bool]]:
    """Mode, tokens and whether there are VAE tokens, of each split in order."""
    mode, length, has_gen = CAUSAL, 0, False
    for piece in pieces:
        if piece.starts_split and length:
            yield mode, length, has_gen
            length, has_gen = 0, False
        if not length:
            mode = piece.mode
        length += piece.length
        has_gen = has_gen or piece.kind == VAE
    if length:
        yield mode, length, has_gen
