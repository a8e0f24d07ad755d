"""What every format becomes, a list of entries in reading order, content still encoded, and how it is laid out.

One rule serves all formats. What is generated and what is shown follows from which entries carry a loss; how texts
become ids and files become pixels is decided in `prepare.py`.
"""

from dataclasses import dataclass
from typing import Literal

from megabagel.data.faults import DataFault


@dataclass(frozen=True)
class ImageSource:
    """An encoded picture: its bytes, or where they are."""

    number: int  # among the pictures of its row, in the order in which the row names them
    content: bytes | None = None
    path: str | None = None  # absolute path or URL, already checked against the data set's folder
    size: tuple[int, int] | None = None  # width and height, upright, where an index tells them


@dataclass(frozen=True)
class Entry:
    """A text or a picture. `loss`: the text is learnt, the picture is generated. None in the other fields: by rule."""

    text: str | None = None
    image: ImageSource | None = None
    loss: bool = False
    enable_cfg: bool | None = None  # may be dropped as a condition
    vae: bool | None = None  # a shown picture enters through the autoencoder
    vit: bool | None = None  # and through the ViT


@dataclass(frozen=True)
class Part:
    """One item of a sample before its content is read. `image` with kind vae_image or vit_image, else `text`."""

    kind: Literal["text", "vit_image", "vae_image"]
    text: str | None = None
    image: ImageSource | None = None
    loss: bool = False
    enable_cfg: bool = False


def lay_out(entries: list[Entry], *, visual_und: bool = True, visual_gen: bool = True) -> list[Part]:
    """Entries as BAGEL orders them.

    Without a generated picture, shown ones enter through the ViT alone and nothing is dropped for guidance. With one,
    shown pictures enter through the autoencoder, then the ViT, and conditions may be dropped; a generated picture
    that something follows is shown again behind its noised self. `visual_und`, `visual_gen`: what the model has.
    Raises DataFault where a document needs what the model lacks, or has nothing in it.
    """
    if not entries:
        raise DataFault("bad_row", "holds neither text nor pictures")
    generates = any(entry.image is not None and entry.loss for entry in entries)
    if generates and not visual_gen:
        raise DataFault("bad_row", "generates a picture, but model.visual_gen is false")
    parts: list[Part] = []
    for place, entry in enumerate(entries):
        guided = generates and not entry.loss if entry.enable_cfg is None else entry.enable_cfg
        if entry.image is None:
            parts.append(Part("text", text=entry.text, loss=entry.loss, enable_cfg=guided))
            continue
        if entry.loss:
            parts.append(Part("vae_image", image=entry.image, loss=True))
            if place == len(entries) - 1:
                continue
            guided = entry.enable_cfg is None or entry.enable_cfg
        vae = generates if entry.vae is None else entry.vae
        vit = True if entry.vit is None else entry.vit
        if vae and visual_gen:
            parts.append(Part("vae_image", image=entry.image, enable_cfg=guided))
        if vit and visual_und:
            parts.append(Part("vit_image", image=entry.image, enable_cfg=guided))
        if not (vae and visual_gen) and not (vit and visual_und):
            raise DataFault("bad_row", "shows a picture that the model cannot see; set model.visual_und to true")
    return parts
