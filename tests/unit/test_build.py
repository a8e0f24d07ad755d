"""The build of csrc/ says what a machine lacks, keeps to what it is asked for, and never hides a compiler's message."""

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.fixture
def build(tmp_path, monkeypatch) -> ModuleType:
    """build.py beside one small source per library, in a folder whose name a shell would split, without CUDA."""
    repository = tmp_path / "my repository $x"
    for library in ("planner", "ops"):
        (repository / "csrc" / library).mkdir(parents=True)
        source = '#include "value.h"\nextern "C" __attribute__((visibility("default"))) int value() { return VALUE; }\n'
        (repository / "csrc" / library / "value.cpp").write_text(source)
        (repository / "csrc" / library / "value.h").write_text("#define VALUE 1\n")
    shutil.copy(ROOT / "csrc" / "build.py", repository / "csrc")
    monkeypatch.setenv("MEGABAGEL_CUDA_ARCHS", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    spec = importlib.util.spec_from_file_location("build_under_test", repository / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_nvcc(folder: Path, known: str = "compute_80\ncompute_90\n") -> str:
    folder.mkdir(parents=True)
    (folder / "nvcc").write_text(f"#!/bin/sh\ncat <<'EOF'\n{known}EOF\n")
    (folder / "nvcc").chmod(0o755)
    return str(folder / "nvcc")


def value_of(library: Path) -> int:
    """What the library of a copy returns: the loader would not read the same file twice."""
    copy = library.with_name(f"{os.urandom(4).hex()}.so")
    shutil.copy(library, copy)
    return ctypes.CDLL(str(copy)).value()


@pytest.mark.parametrize("wanted", ["sm_90", "9.0", "90,100", "all"])
def test_a_malformed_architecture_is_refused_with_the_allowed_form(build, tmp_path, wanted):
    with pytest.raises(build.CannotBuild, match=f'holds "{wanted}"; allowed are .* such as "80;90;100", or "" for no'):
        build.cuda_archs(fake_nvcc(tmp_path / "bin"), wanted)


def test_architectures_are_those_of_the_variable_else_the_defaults_that_nvcc_knows(build, tmp_path, monkeypatch):
    nvcc = fake_nvcc(tmp_path / "bin")
    assert build.cuda_archs(nvcc) == []  # the variable is empty: CUDA is left out
    monkeypatch.setenv("MEGABAGEL_CUDA_ARCHS", "90; 90a")
    assert build.cuda_archs(nvcc) == ["90", "90a"]
    monkeypatch.setenv("MEGABAGEL_CUDA_ARCHS", "100")
    with pytest.raises(build.CannotBuild, match="holds 100, which .*nvcc does not know; it knows 80, 90."):
        build.cuda_archs(nvcc)
    monkeypatch.delenv("MEGABAGEL_CUDA_ARCHS")
    assert build.cuda_archs(nvcc) == ["80", "90"]
    assert build.cuda_archs(None) == []


def test_architectures_without_nvcc_are_an_error_only_where_they_are_asked_for(build):
    with pytest.raises(build.CannotBuild, match='"90" asks for CUDA kernels, but there is no nvcc; put it on PATH'):
        build.cuda_archs(None, "90")


def test_nvcc_of_cuda_home_comes_first(build, tmp_path, monkeypatch):
    on_path, at_home = fake_nvcc(tmp_path / "path"), fake_nvcc(tmp_path / "home" / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert build.find_nvcc() == on_path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.find_nvcc() == at_home
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing here"))
    assert build.find_nvcc() == on_path


def test_only_what_changed_is_compiled_headers_included(build, tmp_path):
    out = tmp_path / "out"
    planner, device = build.build(out)
    assert (value_of(planner), value_of(device)) == (1, 1)
    untouched = (build.BUILD / "ops" / "value.cpp.o").stat().st_mtime_ns
    (build.CSRC / "planner" / "value.h").write_text("#define VALUE 2\n")
    build.build(out)
    assert (value_of(planner), value_of(device)) == (2, 1)
    assert (build.BUILD / "ops" / "value.cpp.o").stat().st_mtime_ns == untouched


def test_flags_for_the_planner_reach_the_planner_alone(build, tmp_path):
    (build.CSRC / "planner" / "value.h").write_text("")
    planner, device = build.build(tmp_path / "out", ["-DVALUE=7"])
    assert (value_of(planner), value_of(device)) == (7, 1)


def test_a_broken_source_ends_the_build_with_the_compilers_message(build, tmp_path, capfd):
    (build.CSRC / "ops" / "value.cpp").write_text("int f() { return undeclared_name; }\n")
    with pytest.raises(build.CannotBuild, match="a compilation failed, see the compiler's message above"):
        build.build(tmp_path / "out")
    assert "undeclared_name" in capfd.readouterr().out


def test_without_a_compiler_nothing_is_built_and_it_is_said(build, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.build(tmp_path / "out") == []
    assert (
        "nothing is compiled, Python code does the work of C++: there is no C++ compiler (CXX=no-such-compiler is no "
        "program); install g++ or set CXX."
    ) in capfd.readouterr().err


@pytest.mark.parametrize("found", ["2.9.1+cu128", "2.9.0a0+nv25"])
def test_an_old_torch_gets_the_planner_only(build, tmp_path, monkeypatch, capfd, found):
    monkeypatch.setattr(build, "version", lambda name: found)
    (planner,) = build.build(tmp_path / "out")
    assert planner.name.startswith("_planner") and not (tmp_path / "out" / "_device.so").exists()
    assert f"are not built, Python code does their work: they need torch 2.10 or newer, but {found} is there." in (
        capfd.readouterr().err
    )


def _project(build: ModuleType) -> Path:
    """A copy of what packaging reads, around the small sources."""
    repository = build.CSRC.parent
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, repository)
    (repository / "megabagel" / "ops").mkdir(parents=True)
    for package in ("megabagel", "megabagel/ops"):
        shutil.copy(ROOT / package / "__init__.py", repository / package)
    return repository


def test_a_wheel_holds_the_libraries(build, tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "-q", "-w", tmp_path]
    subprocess.run(command, cwd=_project(build), check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "megabagel/ops/_device.so" in names
    assert any(name.startswith("megabagel/ops/_planner") for name in names)


@pytest.mark.parametrize(("variable", "value", "code"), [("CXX", "no-such-compiler", 0), ("CXX", "false", 1)])
def test_packaging_goes_on_without_a_compiler_but_not_with_one_that_fails(build, tmp_path, variable, value, code):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")]
    environment = {**os.environ, variable: value}
    done = subprocess.run(command, cwd=_project(build), env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("nothing is compiled" if code == 0 else "megabagel: a compilation failed") in done.stderr


def load_copy_of_the_loader(tmp_path: Path) -> ModuleType:
    """megabagel/ops/library.py beside whatever the test has put there."""
    path = tmp_path / "megabagel" / "ops" / "library.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "megabagel" / "ops" / "library.py", path)
    spec = importlib.util.spec_from_file_location("library_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_operators_that_are_older_than_a_source_are_not_used(tmp_path, caplog):
    (tmp_path / "megabagel" / "ops").mkdir(parents=True)
    (tmp_path / "csrc" / "ops").mkdir(parents=True)
    (tmp_path / "megabagel" / "ops" / "_device.so").touch()
    (tmp_path / "csrc" / "ops" / "new.cu").touch()
    os.utime(tmp_path / "megabagel" / "ops" / "_device.so", (1, 1))
    assert not load_copy_of_the_loader(tmp_path).LOADED
    (record,) = caplog.records
    assert record.getMessage().startswith("The C++ operators are older than their sources, PyTorch code does their")
    assert record.getMessage().endswith("Build them with 'python csrc/build.py' (needs g++).")


def test_operators_without_cuda_are_named_once_when_a_gpu_asks_for_them(tmp_path, caplog):
    loader = load_copy_of_the_loader(tmp_path)
    caplog.clear()
    loader.LOADED = True
    on_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"), is_cuda=True)
    assert not any(loader.has_kernel(name, on_gpu) for name in ("no_such_operator", "nor_this_one"))
    (record,) = caplog.records
    assert record.getMessage().startswith("The C++ operators are built without CUDA, PyTorch code does their work")


def check_cuda(*arguments: object) -> tuple[subprocess.CompletedProcess, dict]:
    command = [sys.executable, str(ROOT / "tools" / "check_cuda.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done, json.loads(done.stdout.splitlines()[-1])


@needs_nvcc
def test_every_cuda_source_compiles_for_three_architectures_without_spills():
    done, line = check_cuda()
    assert done.returncode == 0, done.stdout + done.stderr
    assert line["sources"] == len(list((ROOT / "csrc/ops").glob("*.cu"))) and line["kernels"] > 0
    assert line["archs"] == ["sm_100", "sm_80", "sm_90"]


@needs_nvcc
def test_a_kernel_that_spills_is_named(tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text("""
__global__ void too_wide(float* x) {
  float v[96];
  for (int i = 0; i < 96; ++i) v[i] = x[i * 32 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 96; ++i) x[i * 32 + threadIdx.x] = v[95 - i] * v[i];
}
""")
    done, line = check_cuda("--archs", "90", "--maxrregcount", 32, source)
    assert done.returncode == 1
    assert line["spilling"] == ["spilling.cu too_wide on sm_90"] and not line["pass"]
    assert "error: spilling.cu too_wide on sm_90 spills registers to memory" in done.stderr


def test_the_report_counts_functions_that_are_not_inlined():
    sys.path.insert(0, str(ROOT / "tools"))
    from check_cuda import parse_report

    (kernel,) = parse_report(
        "a.cu",
        """ptxas info    : Compiling entry function 'outer' for 'sm_90'
ptxas info    : Function properties for outer
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for inner
    16 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 24 bytes cumulative stack size, 1024 bytes smem
""",
    )
    assert kernel == ("a.cu", "outer", "sm_90", 40, 1024, 24, 16)
