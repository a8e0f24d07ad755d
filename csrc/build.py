"""Builds the C++ and CUDA code of csrc/ with ninja: the packing planner (pybind11) and the device ops (torch).

Used by setup.py; alone: `python csrc/build.py --out DIR [--planner-flags=...]`. Object files stay in build/csrc, so a
second call compiles what changed only.

MEGABAGEL_CUDA_ARCHS: compute capabilities of the CUDA kernels, "80;90;100" when not set; "" leaves CUDA out.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

CSRC = Path(__file__).resolve().parent
BUILD = CSRC.parent / "build" / "csrc"
CUDA_ARCHS = "80;90;100"
# The oldest torch that the device ops run on, 2.10: they use nothing newer of the stable ABI.
TORCH_TARGET = "0x020a000000000000"
COMMON_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=return-type"]
COMMON_FLAGS.append(f"-fmacro-prefix-map={CSRC}/=")  # messages name files as the repository does


def nvcc() -> str | None:
    """CUDA's compiler: the one in CUDA_HOME, else the one on PATH, else None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def cuda_archs() -> list[str]:
    """Compute capabilities to compile for, such as "90"."""
    return [arch.strip() for arch in os.environ.get("MEGABAGEL_CUDA_ARCHS", CUDA_ARCHS).split(";") if arch.strip()]


def torch_flags() -> list[str]:
    """Include paths and definitions of torch's stable ABI."""
    import torch

    include = Path(torch.__file__).parent / "include"
    return [f"-isystem {include}", f"-I{CSRC}", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]


def _torch_link_flags() -> list[str]:
    """The library with the stable ABI; at run time it is the one that `import torch` has loaded."""
    import torch

    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]


def cuda_flags() -> list[str]:
    """nvcc's flags beside those of the architectures."""
    host = f"-fPIC,-fmacro-prefix-map={CSRC}/="
    return ["-O3", "-std=c++17", "-Xcompiler", host, "--expt-relaxed-constexpr", "-DUSE_CUDA"]


def _cxx() -> str | None:
    return next((c for c in (os.environ.get("CXX"), "g++", "clang++", "c++") if c and shutil.which(c)), None)


class _Ninja:
    """Lines of a build.ninja; objects are named after their source, the library they belong to first."""

    def __init__(self):
        self.lines = [
            "ninja_required_version = 1.5",
            "rule cxx\n  command = $cxx -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule nvcc\n  command = $nvcc -MD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule link\n  command = $linker -shared $in -o $out $flags",
        ]

    def objects(self, library: str, sources: list[Path], rule: str, program: str, flags: list[str]) -> list[str]:
        names = []
        for source in sources:
            name = f"{library}/{source.name}.o"
            self.lines.append(f"build {name}: {rule} {source}\n  {rule} = {program}\n  flags = {' '.join(flags)}")
            names.append(name)
        return names

    def link(self, library: Path, objects: list[str], program: str, flags: list[str]) -> None:
        self.lines.append(
            f"build {library}: link {' '.join(objects)}\n  linker = {program}\n  flags = {' '.join(flags)}"
        )


def _generate(archs: list[str]) -> list[str]:
    """nvcc's code generation: machine code for each architecture, and for later ones what the driver compiles."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    portable = [arch for arch in archs if arch.isdigit()]  # those with a letter run on one chip only
    if portable:
        newest = max(portable, key=int)
        flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return flags


def build(out: Path, planner_flags: list[str] | None = None) -> list[Path]:
    """Compile everything into `out`; returns the libraries. `planner_flags` are added for the planner (sanitizers).

    Raises RuntimeError when there is no C++ compiler and CalledProcessError when a compilation fails.
    """
    import pybind11

    cxx = _cxx()
    if cxx is None:
        raise RuntimeError("no C++ compiler was found; install g++ or clang++, or set CXX")
    ninja = _Ninja()
    planner = out / f"_planner{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = [*COMMON_FLAGS, *(planner_flags or [])]
    includes = [f"-I{CSRC}", f"-isystem {pybind11.get_include()}", f"-isystem {sysconfig.get_paths()['include']}"]
    objects = ninja.objects("planner", sorted(CSRC.glob("planner/*.cpp")), "cxx", cxx, [*flags, *includes])
    ninja.link(planner, objects, cxx, [*(planner_flags or []), "-lpthread"])
    libraries = [planner]

    device = out / "_device.so"
    objects = ninja.objects("ops", sorted(CSRC.glob("ops/*.cpp")), "cxx", cxx, [*COMMON_FLAGS, *torch_flags()])
    linker, link_flags = cxx, [*_torch_link_flags(), "-lpthread", "-ldl"]
    if (compiler := nvcc()) is not None and (archs := cuda_archs()):
        sources, flags = sorted(CSRC.glob("ops/*.cu")), [*cuda_flags(), *torch_flags(), *_generate(archs)]
        objects += ninja.objects("ops", sources, "nvcc", compiler, flags)
        linker = f"{compiler} -ccbin {cxx}"  # it knows where its runtime library lies, and links it statically
    ninja.link(device, objects, linker, link_flags)
    libraries.append(device)

    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text("\n".join(ninja.lines) + "\n", encoding="utf-8")
    jobs = os.environ.get("MAX_JOBS")
    program = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
    subprocess.run([program, "-C", str(BUILD), *(["-j", jobs] if jobs else [])], check=True)
    return libraries


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CSRC.parent / "megabagel" / "ops", help="folder of the libraries")
    parser.add_argument("--planner-flags", default="", help="added for the planner, such as -fsanitize=address")
    arguments = parser.parse_args()
    build(arguments.out.resolve(), arguments.planner_flags.split())
