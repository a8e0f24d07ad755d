"""Builds the C++ and CUDA code of csrc/ with ninja: the packing planner (pybind11) and the device ops (torch).

Used by setup.py; alone: `python csrc/build.py --out DIR [--planner-flags=...]`. Object files stay in build/csrc, so a
second call compiles what changed only. It knows nothing of pip: what a machine lacks is said, never installed.

CXX, CUDA_HOME: the compilers, else those on PATH. MAX_JOBS: compilations at a time.
MEGABAGEL_CUDA_ARCHS: compute capabilities of the CUDA kernels, "80;90;100" when not set; "" leaves CUDA out.
"""

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

CSRC = Path(__file__).resolve().parent
BUILD = CSRC.parent / "build" / "csrc"
CUDA_ARCHS = "80;90;100"
# The oldest torch that the device ops run on: they use nothing newer of its stable ABI.
OLDEST_TORCH = (2, 10)
TORCH_TARGET = "0x020a000000000000"
PREFIX_MAP = f"-fmacro-prefix-map={CSRC}/="  # messages name files as the repository does
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=return-type", PREFIX_MAP]
CUDA_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-Xcompiler", "-fPIC"]
CUDA_FLAGS += ["-Xcompiler", PREFIX_MAP, "-Xptxas", "-v"]  # -v only reports: tools/check_cuda.py reads it


class CannotBuild(RuntimeError):
    """This machine lacks something, or a setting is wrong; the message is one sentence that says what to do."""


class NothingToBuildWith(CannotBuild):
    """A part is left out because its compiler or library is absent, which nobody asked for by name."""


def find_cxx() -> str:
    """The C++ compiler. Raises NothingToBuildWith when there is none."""
    wanted = os.environ.get("CXX")
    found = next((c for c in ([wanted] if wanted else ["g++", "clang++", "c++"]) if shutil.which(c)), None)
    if found is None:
        names = f"CXX={wanted} is no program" if wanted else "neither g++ nor clang++ is on PATH"
        raise NothingToBuildWith(f"there is no C++ compiler ({names}); install g++ or set CXX.")
    return found


def find_nvcc() -> str | None:
    """CUDA's compiler: the one in CUDA_HOME, else the one on PATH, else None."""
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def cuda_archs(nvcc: str | None, wanted: str | None = None) -> list[str]:
    """Compute capabilities to compile for, such as "90": `wanted`, else MEGABAGEL_CUDA_ARCHS, else those of CUDA_ARCHS
    that `nvcc` knows. Raises CannotBuild when an explicit one is malformed, unknown to nvcc, or there is no nvcc."""
    wanted = os.environ.get("MEGABAGEL_CUDA_ARCHS") if wanted is None else wanted
    archs = [arch.strip() for arch in (CUDA_ARCHS if wanted is None else wanted).split(";") if arch.strip()]
    if not archs or (nvcc is None and wanted is None):
        return []
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise CannotBuild(
                f'MEGABAGEL_CUDA_ARCHS holds "{arch}"; allowed are compute capabilities without a point, separated by '
                f'semicolons, such as "{CUDA_ARCHS}", or "" for no CUDA.'
            )
    if nvcc is None:
        raise CannotBuild(
            f'MEGABAGEL_CUDA_ARCHS="{wanted}" asks for CUDA kernels, but there is no nvcc; put it on PATH, set '
            "CUDA_HOME or leave the variable out."
        )
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = re.findall(r"compute_(\w+)", listed)
    unknown = [arch for arch in archs if arch.rstrip("af") not in known]
    if unknown and wanted is not None:
        raise CannotBuild(
            f"MEGABAGEL_CUDA_ARCHS holds {unknown[0]}, which {nvcc} does not know; it knows {', '.join(known)}."
        )
    return [arch for arch in archs if arch not in unknown]


def find_torch() -> Path:
    """Folder of the installed torch, which is not imported. Raises NothingToBuildWith when it is absent or too old."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NothingToBuildWith("torch is not installed; install it first.")
    found = version("torch")
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST_TORCH:
        raise NothingToBuildWith(f"they need torch {'.'.join(map(str, OLDEST_TORCH))} or newer, but {found} is there.")
    return Path(spec.origin).parent


def torch_flags(torch: Path) -> list[str]:
    """Include paths and definitions of torch's stable ABI."""
    return ["-isystem", f"{torch}/include", f"-I{CSRC}", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]


def _generate(archs: list[str]) -> list[str]:
    """nvcc's code generation: machine code for each architecture, and for later ones what the driver compiles."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    portable = [arch for arch in archs if arch.isdigit()]  # those with a letter run on one chip only
    if portable:
        newest = max(portable, key=int)
        flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return flags


class Ninja:
    """Collects the lines of a build.ninja and runs it; objects are named after their source, a folder of theirs first.

    A CUDA object leaves what nvcc said beside itself, as NAME.log; warnings and what made it fail are printed.
    """

    def __init__(self):
        self.lines = [
            "ninja_required_version = 1.5",
            "rule cxx\n  command = $cxx -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule nvcc\n  command = $nvcc -MD -MF $out.d $flags -c $in -o $out >$out.log 2>&1"
            " || { cat $out.log; exit 1; }; grep warning $out.log || true\n  depfile = $out.d\n  deps = gcc",
            "rule link\n  command = $linker -shared $in -o $out $flags",
        ]

    def objects(self, folder: str, sources: list[Path], rule: str, program: str, flags: list[str]) -> list[Path]:
        """Compile `sources` by rule "cxx" or "nvcc"; returns the objects."""
        made = []
        for source in sources:
            made.append(BUILD / folder / f"{source.name}.o")
            self._build(made[-1], rule, [source], {rule: shlex.quote(program), "flags": shlex.join(flags)})
        return made

    def link(self, library: Path, objects: list[Path], program: list[str], flags: list[str]) -> None:
        self._build(library, "link", objects, {"linker": shlex.join(program), "flags": shlex.join(flags)})

    def _build(self, out: Path, rule: str, inputs: list[Path], variables: dict[str, str]) -> None:
        names = [re.sub(r"([$ :])", r"$\1", str(path)) for path in (out, *inputs)]
        values = "".join(f"\n  {name} = {value.replace('$', '$$')}" for name, value in variables.items())
        self.lines.append(f"build {names[0]}: {rule} {' '.join(names[1:])}{values}")

    def run(self) -> None:
        """Raises CannotBuild when a compilation fails; what the compiler said is on standard output."""
        beside = Path(sys.executable).parent / "ninja"
        program = shutil.which("ninja") or (str(beside) if beside.exists() else None)
        if program is None:
            raise NothingToBuildWith("ninja is not installed; 'pip install ninja' brings it.")
        BUILD.mkdir(parents=True, exist_ok=True)
        (BUILD / "build.ninja").write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        jobs = os.environ.get("MAX_JOBS")
        command = [program, "-C", str(BUILD), "--quiet", *(["-j", jobs] if jobs else [])]
        if subprocess.run(command).returncode:
            raise CannotBuild(
                "a compilation failed, see the compiler's message above; MEGABAGEL_CUDA_ARCHS='' leaves CUDA out."
            )


def add_planner(ninja: Ninja, out: Path, cxx: str, extra: list[str]) -> Path:
    """The packing planner, compiled and linked with the `extra` flags too."""
    spec = importlib.util.find_spec("pybind11")
    if spec is None:
        raise NothingToBuildWith("pybind11 is not installed; 'pip install pybind11' brings it.")
    library = out / f"_planner{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{CSRC}", "-isystem", f"{Path(spec.origin).parent}/include"]
    includes += ["-isystem", sysconfig.get_paths()["include"]]
    objects = ninja.objects("planner", sorted(CSRC.glob("planner/*.cpp")), "cxx", cxx, [*CXX_FLAGS, *extra, *includes])
    ninja.link(library, objects, [cxx], [*extra, "-lpthread"])
    return library


def add_cuda_objects(
    ninja: Ninja, nvcc: str, cxx: str, archs: list[str], sources: list[Path], extra: list[str] | None = None
) -> list[Path]:
    """The CUDA objects of `sources`; their logs hold ptxas' report of every kernel. `extra`: more flags of nvcc."""
    flags = [*CUDA_FLAGS, *torch_flags(find_torch()), *_generate(archs), "-ccbin", cxx, *(extra or [])]
    return ninja.objects(f"cuda-{'-'.join(archs)}", sources, "nvcc", nvcc, flags)


def add_device_ops(ninja: Ninja, out: Path, cxx: str) -> Path:
    """The device ops, with CUDA kernels where there is an nvcc."""
    torch, nvcc = find_torch(), find_nvcc()
    library, linker = out / "_device.so", [cxx]
    objects = ninja.objects("ops", sorted(CSRC.glob("ops/*.cpp")), "cxx", cxx, [*CXX_FLAGS, *torch_flags(torch)])
    if archs := cuda_archs(nvcc):
        objects += add_cuda_objects(ninja, nvcc, cxx, archs, sorted(CSRC.glob("ops/*.cu")))
        linker = [nvcc, "-ccbin", cxx]  # it knows where its runtime library lies, and links it statically
    elif nvcc is None and (torch / "lib" / "libtorch_cuda.so").exists():
        notice("there is no nvcc, so the operators get no CUDA kernels; put it on PATH or set CUDA_HOME.")
    # at run time the library is the one that `import torch` has loaded
    ninja.link(library, objects, linker, [f"-L{torch}/lib", "-ltorch_cpu", "-lpthread", "-ldl"])
    return library


def notice(text: str) -> None:
    print(f"megabagel: {text}", file=sys.stderr)


def build(out: Path, planner_flags: list[str] | None = None) -> list[Path]:
    """Compile what this machine can into `out`; returns the libraries. `planner_flags` are added for the planner
    (sanitizers). What is left out is said on standard error.

    Raises CannotBuild when a compilation fails or a setting is wrong.
    """
    ninja, libraries = Ninja(), []
    try:
        cxx = find_cxx()
        parts = {
            "packing planner": lambda: add_planner(ninja, out, cxx, planner_flags or []),
            "operators": lambda: add_device_ops(ninja, out, cxx),
        }
        for name, add in parts.items():
            try:
                libraries.append(add())
            except NothingToBuildWith as reason:
                notice(f"the C++ {name} are not built, Python code does their work: {reason}")
        if libraries:
            ninja.run()
        for library in libraries:
            library.touch()  # megabagel/ops/library.py takes one that is older than a source for outdated
    except NothingToBuildWith as reason:
        notice(f"nothing is compiled, Python code does the work of C++: {reason}")
        return []
    return libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CSRC.parent / "megabagel" / "ops", help="folder of the libraries")
    parser.add_argument("--planner-flags", default="", help="added for the planner, such as -fsanitize=address")
    arguments = parser.parse_args()
    try:
        libraries = build(arguments.out.resolve(), arguments.planner_flags.split())
    except CannotBuild as error:
        sys.exit(f"megabagel: {error}")
    for library in libraries:
        print(library)
    if not libraries:
        sys.exit(1)


if __name__ == "__main__":
    main()
