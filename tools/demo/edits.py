"""Editing samples: pairs of emojis that differ in skin tone or gender, with instructions, as official parquet.

The pairs are found from the emojis' codes alone, so finding them needs no picture.
There are no edits of several turns.
"""

import hashlib
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from tools.demo.emojis import TONES, Emoji, is_held_out, render_emoji
from tools.demo.formats import SIDE, encode_png, write_json, write_parquet


@dataclass(frozen=True)
class Edit:
    """From one emoji to a variant of it, and how one may ask for that."""

    source: Emoji
    target: Emoji
    instructions: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        return is_held_out(self.source.base) or is_held_out(self.target.base)


def tone_edits(emojis: list[Emoji], between_tones: bool = False) -> list[Edit]:
    """Neutral to each of five skin tones, for emojis that have all five; also tone to tone when asked for."""
    by_code = {e.code: e for e in emojis}
    toned: dict[str, dict[str, Emoji]] = {}
    for e in emojis:
        tones = [part for part in e.code.split("-") if part in TONES]
        if tones and len(set(tones)) == 1:  # couples of two tones have no single neutral form
            toned.setdefault(e.base, {})[TONES[tones[0]]] = e
    edits = []
    for base, variants in toned.items():
        if base in by_code and len(variants) == len(TONES):
            sources = [by_code[base], *(variants.values() if between_tones else ())]
            edits += [
                Edit(source, target, (f"change the skin tone to {tone}", f"give it {tone} skin"))
                for source in sources
                for tone, target in variants.items()
                if source is not target
            ]
    return edits


def gender_edits(emojis: list[Emoji], with_tones: bool = False) -> list[Edit]:
    """Man to woman and back, for emojis that differ in nothing else; toned ones too when asked for."""
    by_code = {e.code: e for e in emojis}
    edits = []
    for man in emojis:
        woman = by_code.get(swap_gender(man.code))
        if woman is not None and (with_tones or man.code == man.base):
            edits.append(Edit(man, woman, ("make it a woman", "turn the man into a woman")))
            edits.append(Edit(woman, man, ("make it a man", "turn the woman into a man")))
    return edits


def swap_gender(man_code: str) -> str | None:
    """The woman's code for a man's; None when the emoji shows no man, or more than one person."""
    parts = man_code.split("-")
    signs = [part for part in parts if part in ("2640", "2642")]
    people = [part for part in parts if part in ("1F466", "1F467", "1F468", "1F469", "1F9D1", "1FAF1")]
    if signs == ["2642"] and not people:
        return "-".join("2640" if part == "2642" else part for part in parts)
    if not signs and people == ["1F468"] and parts[0] == "1F468":
        return "-".join(["1F469", *parts[1:]])
    return None


def write_edits(edits: list[Edit], folder: Path, files: int, mirrored: bool = False) -> int:
    """Official editing parquet: `image_list`, `instruction_list`; the info JSON lies beside the folder. -> number of
    rows. `mirrored`: every edit also with left and right exchanged: more shapes than there are emojis."""
    rendered: dict[str, np.ndarray] = {}
    rows = []
    versions = product(edits, (False, True) if mirrored else (False,))
    for edit, is_mirrored in tqdm(sorted(versions, key=version_key), desc=folder.name, mininterval=1):
        pictures = []
        for e in (edit.source, edit.target):
            if e.code not in rendered:
                rendered[e.code] = render_emoji(e.svg, SIDE)
            pictures.append(rendered[e.code][:, :: -1 if is_mirrored else 1])
        rows.append({"image_list": list(map(encode_png, pictures)), "instruction_list": [list(edit.instructions)]})
    fields = [("image_list", pa.list_(pa.binary())), ("instruction_list", pa.list_(pa.list_(pa.string())))]
    groups = write_parquet(rows, pa.schema(fields), folder, files)
    info = {f"{folder.name}/{name}": {"num_row_groups": count} for name, count in groups.items()}
    write_json(info, folder.parent / f"{folder.name}_info.json")
    return len(rows)


def version_key(version: tuple[Edit, bool]) -> str:
    """Neighbours in a file are unrelated."""
    edit, is_mirrored = version
    return hashlib.sha256(f"{edit.source.code} {edit.target.code}{' mirrored' * is_mirrored}".encode()).hexdigest()
