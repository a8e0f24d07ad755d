"""What is in a checkpoint, a BAGEL folder or a safetensors file; how two of them differ; whether one can be read.

    python tools/inspect_checkpoint.py runs/mine                        # in seconds, nothing is loaded
    python tools/inspect_checkpoint.py runs/mine --tensors lm_head      # names, shapes, dtypes of what matches
    python tools/inspect_checkpoint.py runs/mine --compare BAGEL-7B-MoT --weights ema
    python tools/inspect_checkpoint.py runs/mine --config               # the settings that it was written with
    python tools/inspect_checkpoint.py runs/mine/iter_0000100 --verify  # checksums; reads every tensor once

A run folder stands for its newest whole checkpoint. Comparing goes tensor by tensor; a checkpoint and a BAGEL folder
are compared under the released names (--weights), without the fixed position tables, which are computed. Exit code 1:
not equal, or damaged.
"""

import argparse
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from megabagel.checkpoint import folder
from megabagel.checkpoint.contents import Contents, Difference, checkpoint_at, difference, open_contents
from megabagel.checkpoint.errors import CheckpointError
from megabagel.config.folder import LATENT_TABLE, VIT_TABLE

TABLES = (LATENT_TABLE, VIT_TABLE)
FAMILIES = (("optimizer.", "optimizer"), ("ema.", "moving average"), ("", "weights"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="run folder, iter_... folder, BAGEL folder or .safetensors file")
    parser.add_argument("--weights", choices=("ema", "model"), help="a checkpoint under the released names")
    parser.add_argument("--tensors", nargs="?", const="", metavar="PATTERN", help="list tensors whose name matches")
    parser.add_argument("--compare", metavar="OTHER", help="compare tensor by tensor")
    parser.add_argument(
        "--verify", action="store_true", help="checksums of all files; every tensor can be read and is finite"
    )
    parser.add_argument("--config", action="store_true", help="print the configuration as YAML")
    arguments = parser.parse_args(argv)
    try:
        good = not arguments.verify or verify_files(arguments.path)
        if not good:
            return 1
        ours = open_contents(arguments.path, arguments.weights)
        show(ours)
        if arguments.config:
            print(ours.settings or "no configuration is there")
        if arguments.tensors is not None:
            list_tensors(ours, re.compile(arguments.tensors))
        good = not arguments.verify or verify(ours)
        if arguments.compare:
            print()
            theirs = open_contents(arguments.compare, arguments.weights)
            show(theirs)
            good &= compare(ours, theirs)
    except (CheckpointError, re.error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if good else 1


def show(contents: Contents) -> None:
    """Facts, then one line per family and dtype."""
    for name, value in contents.facts.items():
        print(f"{name:10} {value}")
    families: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, shape in contents.shapes.items():
        family = next(family for prefix, family in FAMILIES if name.startswith(prefix))
        total = families[family, str(contents.dtypes[name]).removeprefix("torch.")]
        values = math.prod(shape)
        total[0] += 1
        total[1] += values
        total[2] += values * contents.dtypes[name].itemsize
    for (family, dtype), (tensors, values, size) in families.items():
        print(f"{family:14} {tensors:6,} tensors {values:18,} values {dtype:9} {size / 1e9:9.3f} GB")


def list_tensors(contents: Contents, pattern: re.Pattern) -> None:
    for name, shape in contents.shapes.items():
        if pattern.search(name):
            print(f"{name}  {list(shape)}  {str(contents.dtypes[name]).removeprefix('torch.')}")


def verify_files(path: str) -> bool:
    """Whether all files of a checkpoint have their checksums; nothing else has any."""
    found = checkpoint_at(path)
    if found is None:
        return True
    if fault := folder.verify(found):
        print(f"checkpoint {found} {fault}; copy it again or take another one")
        return False
    records = folder.manifest(found).values()
    print(f"{sum(r.crc32 is not None for r in records):,} of {len(records):,} files have their checksums")
    return True


def verify(contents: Contents) -> bool:
    """Whether every tensor can be read and is finite."""
    bad = []
    for name in tqdm(contents.shapes, desc="reading", unit=" tensors"):
        value = contents.read(name)
        if value.is_floating_point() and not bool(value.isfinite().all()):
            bad.append(f"{name} holds {int((~value.isfinite()).sum()):,} values that are not finite")
    print("\n".join(bad) if bad else f"all {len(contents.shapes):,} tensors can be read and are finite")
    return not bad


def compare(ours: Contents, theirs: Contents) -> bool:
    """Whether names, shapes, dtypes and all values are equal; says what is not."""
    good = True
    for here, there, which in ((ours, theirs, "first"), (theirs, ours, "second")):
        only = [name for name in here.shapes if name not in there.shapes and name not in TABLES]
        if only:
            good = False
            print(f"only in the {which}: {len(only):,} tensors, for example {', '.join(only[:3])}")
    both = [name for name in ours.shapes if name in theirs.shapes]
    if not both:
        print("no tensor has a name in both; compare a checkpoint with a BAGEL folder under --weights ema or model")
        return False
    differences = []
    for name in tqdm(both, desc="comparing", unit=" tensors"):
        if ours.shapes[name] != theirs.shapes[name]:
            good = False
            print(f"{name}: shape {list(ours.shapes[name])} and {list(theirs.shapes[name])}")
            continue
        differences.append(difference(name, ours.read(name), theirs.read(name)))
    unlike = [found for found in differences if found.bit_equal < found.values]
    types = sum(ours.dtypes[name] != theirs.dtypes[name] for name in both)
    values, equal = sum(found.values for found in differences), sum(found.bit_equal for found in differences)
    print(f"{len(differences) - len(unlike):,} of {len(both):,} tensors are equal in every value", end="")
    print(f", {types:,} differ in dtype" if types else "")
    print(f"{equal:,} of {values:,} values are equal; the largest difference is {_largest(unlike):.3g}")
    for found in sorted(unlike, key=lambda found: -found.largest)[:10]:
        share = f"{found.bit_equal / found.values:.1%} of the values equal"
        print(f"{found.name}: largest difference {found.largest:.3g}, {share}")
    return good and not unlike and not types


def _largest(unlike: list[Difference]) -> float:
    """NaN where one of two values is."""
    found = [difference.largest for difference in unlike]
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


if __name__ == "__main__":
    sys.exit(main())
