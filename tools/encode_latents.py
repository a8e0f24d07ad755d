"""Stores what the frozen encoders make of every picture of a data set, so that training need not encode it again.

Moments of the autoencoder's posterior and, with --vit, features of a frozen ViT go to OUT/GROUP; `latents_dir` of the
group, in the data file, is then set to that folder. Losses stay what they are with pictures: noise is drawn later.
"""

import argparse
import fcntl
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from megabagel.checkpoint.errors import CheckpointError
from megabagel.config.datasets import GroupConfig, load_dataset_groups
from megabagel.config.errors import ConfigError
from megabagel.config.load import load_config
from megabagel.config.paths import autoencoder_path, tokenizer_path
from megabagel.config.schema import Config
from megabagel.data.faults import DataError
from megabagel.data.sources import open_source
from megabagel.data.stored import SHARD_SUFFIX, Header, Kind, finished, rows_of
from megabagel.data.stored_writer import count_pictures, faults_in, prepare_folder, write_faults
from megabagel.models.autoencoder import AutoencoderError
from megabagel.models.vision import is_frozen
from megabagel.training.stored import fingerprint
from tools.latents.encode import Encoders, Settings, Stretch
from tools.latents.pictures import VIDEO
from tools.latents.processes import encode_all

FAULTS, LOCK = "faults.jsonl", ".lock"
_EXPECTED = (ConfigError, DataError, CheckpointError, AutoencoderError)
_MIB = 1 << 20
EXAMPLE = """example (settings of the run may follow as in training; the same command again continues):
  python tools/encode_latents.py --config run.yaml --out data/latents --vit --model.freeze_vit true
"""


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The tool's own options, and the settings of the run."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", default=[], help="configuration of the run that will train")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is stored")
    parser.add_argument("--group", action="append", help="only this group of the data file; may be repeated")
    parser.add_argument("--vit", action="store_true", help="features of the ViT too, which must be frozen")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="of what is stored; default: training.params_dtype")
    parser.add_argument("--processes", type=int, default=1, help="they take GPUs in turn, or share the CPU's cores")
    parser.add_argument("--shard-mib", type=int, default=512, help="size at which a shard is closed")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments, rest = parse_arguments(argv)
    try:
        config = load_config([*(f"--config={file}" for file in arguments.config), *rest])
        store(config, arguments)
    except _EXPECTED as error:
        print(f"encode_latents: {error}", file=sys.stderr)
        return 1
    return 0


def store(config: Config, arguments: argparse.Namespace) -> None:
    """Everything after the command line. Raises one of the `_EXPECTED` errors with a sentence for the user."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    with open(arguments.out / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(
                f"another encode_latents writes to {arguments.out}; wait for it or give another --out."
            ) from None
        _store(config, arguments)


def _store(config: Config, arguments: argparse.Namespace) -> None:
    _check(config, arguments)
    groups = _chosen(load_dataset_groups(config.data.dataset_config_file), arguments.group)
    wanted = {name: _kinds(config, group, arguments.vit) for name, group in groups.items()}
    kinds = tuple(sorted({kind for of_group in wanted.values() for kind in of_group}))
    dtype, out = arguments.dtype or config.training.params_dtype, arguments.out.resolve()
    prints, most_bad = _fingerprints(config, kinds), config.data.max_bad_fraction
    stretches: list[Stretch] = []
    for name, group in groups.items():
        if not wanted[name]:
            print(f"{name}: nothing to store ({_why_nothing(group, arguments.vit)})", flush=True)
            continue
        rows = sum(open_source(name, group, config.data.seed).blocks)
        for kind in wanted[name]:
            args = group.vae_args if kind == "vae_image" else group.vit_args
            header = Header(kind, prints[kind], dtype, asdict(args), rows_of(group))
            prepare_folder(out / name / kind, header)
        stretches += _left(out / name, name, wanted[name], rows)
    settings = Settings(config, groups, out, kinds, dtype, arguments.shard_mib * _MIB, arguments.processes)
    with tqdm(total=sum(s.stop - s.first for s in stretches), unit="row", disable=not sys.stderr.isatty()) as bar:
        if stretches:
            encode_all(settings, stretches, bar.update)
    bad = [name for name in groups if wanted[name] and _summarise(out / name, name, wanted[name]) > most_bad]
    if bad:
        raise DataError(
            f"more than data.max_bad_fraction = {most_bad} of the rows of {', '.join(bad)} cannot be used; mend them "
            f"or the settings, delete the group's folder below {out} and run again, or raise max_bad_fraction."
        )


def _check(config: Config, arguments: argparse.Namespace) -> None:
    if config.data.dataset_config_file is None:
        raise ConfigError("data.dataset_config_file is not set; give it, or a --config that has it.")
    if tokenizer_path(config) is None:
        raise ConfigError("no tokenizer is set; give data.tokenizer or checkpoint.init_from.")
    if config.model.visual_gen and autoencoder_path(config) is None:
        raise ConfigError("no autoencoder is set; give checkpoint.init_vae or checkpoint.init_from.")
    if arguments.vit and not is_frozen(config.model):
        raise ConfigError(
            "--vit stores features of a ViT that trains with this configuration, so they would not stay true; set "
            "model.freeze_vit to true or leave --vit out."
        )
    for option in ("processes", "shard_mib"):
        if getattr(arguments, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} must be at least 1.")


def _chosen(groups: dict[str, GroupConfig], names: list[str] | None) -> dict[str, GroupConfig]:
    for name in names or []:
        if name not in groups:
            raise ConfigError(f"--group {name} is not in the data file; it has {', '.join(groups)}.")
    return {name: group for name, group in groups.items() if not names or name in names}


def _kinds(config: Config, group: GroupConfig, vit: bool) -> tuple[Kind, ...]:
    """What is stored of a group's pictures."""
    if group.format == VIDEO:
        return ()
    kinds: list[Kind] = []
    if config.model.visual_gen and group.vae_args is not None:
        kinds.append("vae_image")
    if config.model.visual_und and vit and group.vit_args is not None:
        kinds.append("vit_image")
    return tuple(kinds)


def _why_nothing(group: GroupConfig, vit: bool) -> str:
    if group.format == VIDEO:
        return "each visit draws other frames"
    return "it has no pictures" if vit else "pictures, if any, enter through the ViT alone; see --vit"


def _fingerprints(config: Config, kinds: Iterable[Kind]) -> dict[Kind, str]:
    networks = Encoders(config, tuple(kinds))
    found = {"vae_image": networks.autoencoder, "vit_image": networks.tower}
    return {kind: fingerprint(found[kind]) for kind in kinds}


def _left(folder: Path, group: str, kinds: tuple[Kind, ...], rows: int) -> Iterator[Stretch]:
    """Rows that some kind lacks, in stretches that lack the same kinds."""
    parts = {kind: finished(folder / kind) for kind in kinds}
    edges = sorted({0, rows, *(edge for of_kind in parts.values() for part in of_kind for edge in part)})
    for first, stop in zip(edges, edges[1:], strict=False):
        missing = tuple(kind for kind in kinds if not any(a <= first < b for a, b in parts[kind]))
        if missing:
            yield Stretch(group, first, stop, missing)


def _summarise(folder: Path, group: str, kinds: tuple[Kind, ...]) -> float:
    """Say what there is now, and list bad rows; the share of those is returned."""
    faults = {fault["row"]: fault for kind in kinds for fault in faults_in(folder / kind)}
    write_faults(folder / FAULTS, [faults[row] for row in sorted(faults)])
    for kind in kinds:
        shards = [file for file in os.scandir(folder / kind) if file.name.endswith(SHARD_SUFFIX)]
        size = sum(file.stat().st_size for file in shards)
        rows = sum(stop - first for first, stop in finished(folder / kind))
        pictures = count_pictures(folder / kind)
        print(f"{group}: {pictures} {kind} of {rows} rows, {size / _MIB:.1f} MiB in {len(shards)} shards")
    if faults:
        first = faults[min(faults)]
        print(f"{group}: {len(faults)} rows cannot be used, listed in {folder / FAULTS}; the first: {first['message']}")
    print(f"{group}: set latents_dir: {folder}", flush=True)
    return len(faults) / max(1, rows)


if __name__ == "__main__":
    sys.exit(main())
