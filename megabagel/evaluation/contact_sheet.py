"""Many pictures and texts on one sheet, saved as one PNG: what a model made, at one glance.

Drawing only; what is shown, and in which order, is the caller's matter.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

Cell = Image.Image | str
_MARGIN, _INK, _PAPER, _FRAME = 8, "#202020", "#ffffff", "#d0d0d0"


def contact_sheet(
    rows: Sequence[Sequence[Cell]],
    path: str | Path,
    captions: Sequence[Sequence[str]] | None = None,
    *,
    side: int = 128,
    text_size: int = 13,
) -> Image.Image:
    """Draw `rows` and save them as PNG at `path`, whose folder is made; returns the sheet.

    A cell is `side` pixels wide: a picture fits into it (small ones are enlarged by whole factors), a text is wrapped
    and grows downwards. A row that is one text alone is a heading over the whole width. `captions`: per row a text
    under each cell, "" for none; a row may have fewer captions than cells. Raises ValueError without any row, or when
    there are more captions than rows.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    captions = [()] * len(rows) if captions is None else captions
    if len(captions) > len(rows):
        raise ValueError(f"{len(captions)} rows of captions for {len(rows)} rows of cells")
    font, heading = _font(text_size), _font(round(text_size * 1.4))
    columns = max(1, *(len(row) for row in rows))
    width = columns * (side + _MARGIN) + _MARGIN
    strips = []
    for number, row in enumerate(rows):
        if len(row) == 1 and isinstance(row[0], str):
            strips.append(_text_block(row[0], heading, width - 2 * _MARGIN))
        else:
            under = captions[number] if number < len(captions) else ()
            strips.append(_strip(row, under, font, side, width))
    sheet = Image.new("RGB", (width, sum(strip.height + _MARGIN for strip in strips) + _MARGIN), _PAPER)
    top = _MARGIN
    for strip in strips:
        sheet.paste(strip, (_MARGIN, top))
        top += strip.height + _MARGIN
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")
    return sheet


def in_columns(
    rows: Sequence[Sequence[Cell]], captions: Sequence[Sequence[str]], width: int
) -> tuple[list[list[Cell]], list[list[str]]]:
    """Short rows put behind each other as long as they have at most `width` cells."""
    wide, notes = [], []
    for row, caption in zip(rows, captions, strict=True):
        if wide and len(wide[-1]) + len(row) <= width:
            wide[-1] += row
            notes[-1] += caption
        else:
            wide.append(list(row))
            notes.append(list(caption))
    return wide, notes


def _strip(
    row: Sequence[Cell], captions: Sequence[str], font: ImageFont.FreeTypeFont, side: int, width: int
) -> Image.Image:
    """Cells beside each other, captions below them."""
    cells = [_text_block(cell, font, side) if isinstance(cell, str) else _fitted(cell, side) for cell in row]
    notes = [_text_block(caption, font, side) for caption in captions[: len(row)]]
    cells_height = max(cell.height for cell in cells) if cells else 0
    notes_height = max((note.height for note in notes), default=0)
    strip = Image.new("RGB", (width - 2 * _MARGIN, max(1, cells_height + notes_height)), _PAPER)
    for number, cell in enumerate(cells):
        strip.paste(cell, (number * (side + _MARGIN), 0))
    for number, note in enumerate(notes):
        strip.paste(note, (number * (side + _MARGIN), cells_height))
    return strip


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """The picture in a frame, as large as fits into a square of `side`; what is transparent becomes white."""
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, _PAPER), layer)
    image = image.convert("RGB")
    scale = (side - 2) / max(image.size)
    if scale >= 1:
        image = image.resize([size * int(scale) for size in image.size], Image.Resampling.NEAREST)
    else:
        image = image.resize([max(1, round(size * scale)) for size in image.size], Image.Resampling.LANCZOS)
    framed = Image.new("RGB", (image.width + 2, image.height + 2), _FRAME)
    framed.paste(image, (1, 1))
    return framed


def _text_block(text: str, font: ImageFont.FreeTypeFont, width: int) -> Image.Image:
    lines = _wrapped(text, font, width)
    line_height = sum(font.getmetrics()) + 1
    block = Image.new("RGB", (width, max(1, line_height * len(lines))), _PAPER)
    draw = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        draw.text((0, number * line_height), line, fill=_INK, font=font)
    return block


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines that are not wider than `width` pixels; a word that is too long by itself is cut."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if line and font.getlength(joined) > width:
                lines.append(line)
                joined = word
            while len(joined) > 1 and font.getlength(joined) > width:
                fits = max(n for n in range(1, len(joined)) if n == 1 or font.getlength(joined[:n]) <= width)
                lines.append(joined[:fits])
                joined = joined[fits:]
            line = joined
        lines.append(line)
    return lines


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: more scripts than Pillow's own font has."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
