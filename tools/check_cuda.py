"""Compiles every CUDA source of csrc/ for several GPU generations and shows what each kernel uses. Runs nothing.

    python tools/check_cuda.py                       # csrc/ops/*.cu for sm_80, sm_90 and sm_100
    python tools/check_cuda.py --archs 90 csrc/ops/swiglu.cu

Needs nvcc and torch's headers, no GPU; objects are those of the installation, so only what changed is compiled. Exit
status 1 when a source does not compile or a kernel spills registers to memory. The last line is JSON.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "csrc")]

import build  # noqa: E402


class Kernel(NamedTuple):
    """What ptxas reports of one kernel on one architecture; sizes in bytes, per thread but for shared memory."""

    source: str
    name: str
    arch: str
    registers: int
    shared: int
    stack: int
    spills: int


def parse_report(source: str, log: str) -> list[Kernel]:
    """The kernels of an nvcc log (`-Xptxas -v`), names as the compiler mangles them."""
    kernels = []
    for part in re.split(r"Compiling entry function ", log)[1:]:
        name, arch = re.match(r"'(\w+)' for '(\w+)'", part).groups()
        used = re.search(r"Used (\d+) registers([^\n]*)", part)
        shared = re.search(r"(\d+) bytes smem", used[2])
        # functions that are not inlined are reported apart, with stack and spills of their own
        stack = sum(map(int, re.findall(r"(\d+) bytes stack frame", part)))
        spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", part)))
        kernels.append(Kernel(source, name, arch, int(used[1]), int(shared[1]) if shared else 0, stack, spills))
    return kernels


def demangle(names: list[str]) -> list[str]:
    """Readable names without parameters and our namespace; as they are where there is no c++filt."""
    program = shutil.which("c++filt")
    if program is None:
        return names
    done = subprocess.run([program, "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [re.sub(r"megabagel::|\(anonymous namespace\)::|__nv_", "", name) for name in done.stdout.splitlines()]


def compile_kernels(sources: list[Path], archs: str, flags: list[str]) -> list[Kernel]:
    """Raises build.CannotBuild, in one sentence, when something is missing or does not compile."""
    nvcc = build.find_nvcc()
    archs = build.cuda_archs(nvcc, archs)
    ninja = build.Ninja()
    objects = build.add_cuda_objects(ninja, nvcc, build.find_cxx(), archs, sources, flags)
    ninja.run()
    kernels = [k for o in objects for k in parse_report(o.stem, Path(f"{o}.log").read_text(encoding="utf-8"))]
    names = demangle([kernel.name for kernel in kernels])
    kernels = [kernel._replace(name=name) for kernel, name in zip(kernels, names, strict=True)]
    return sorted(kernels, key=lambda kernel: (kernel.source, kernel.name, int(re.sub(r"\D", "", kernel.arch))))


def print_table(kernels: list[Kernel]) -> None:
    titles = ("source", "kernel", "arch", "registers", "shared", "stack", "spills")
    rows = [titles, *(tuple(map(str, kernel)) for kernel in kernels)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        texts = [text.ljust(width) for text, width in zip(row[:3], widths[:3], strict=True)]
        numbers = [text.rjust(width) for text, width in zip(row[3:], widths[3:], strict=True)]
        print("  ".join(texts + numbers))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path, help="default: csrc/ops/*.cu")
    parser.add_argument("--archs", default=build.CUDA_ARCHS, help=f'compute capabilities, default "{build.CUDA_ARCHS}"')
    parser.add_argument("--maxrregcount", type=int, metavar="N", help="registers that a kernel may use (spills sooner)")
    options = parser.parse_args(argv)
    sources = [path.resolve() for path in options.sources] or sorted((ROOT / "csrc" / "ops").glob("*.cu"))
    flags = [f"--maxrregcount={options.maxrregcount}"] if options.maxrregcount else []
    try:
        kernels = compile_kernels(sources, options.archs, flags)
    except build.CannotBuild as error:
        sys.exit(f"error: {error}")
    print_table(kernels)
    spilling = [f"{k.source} {k.name} on {k.arch}" for k in kernels if k.spills]
    for kernel in spilling:
        print(f"error: {kernel} spills registers to memory; let it hold fewer values at a time.", file=sys.stderr)
    summary = {"sources": len(sources), "archs": sorted({k.arch for k in kernels}), "kernels": len(kernels)}
    summary["registers"] = max((k.registers for k in kernels), default=0)
    print(json.dumps({"check": "cuda", **summary, "spilling": spilling, "pass": not spilling}))
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
