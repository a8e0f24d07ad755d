# Chooses a Python and installs megabagel into it. Sourced, not run: `prepare_environment [EXTRA]` sets PYTHON.
#
# An active virtual or conda environment is used as it is; otherwise .venv is made beside this repository. A torch that
# the environment already has (an NVIDIA container's, a cluster module's) is kept: pip is not allowed to touch it.
#
# MEGABAGEL_PYTHON: an interpreter that has all that is needed; it is used as it is and nothing is installed.
# TORCH_INDEX_URL: where torch is taken from when none is there, for example PyTorch's index of CPU wheels.

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
TORCH_REQUIREMENT="torch==2.13.0"
DISK_GB=6
export PATH # an empty environment leaves it to bash alone, and Python could not find itself

say() { printf '\n==> %s\n' "$*"; }
fail() { printf '\nerror: %s\n' "$*" >&2; exit 1; }

is_recent_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
has_torch() { "$1" -c 'import torch' 2>/dev/null; }

prepare_environment() {
    local extra="${1:-}" prefix stamp
    if [[ -n "${MEGABAGEL_PYTHON:-}" ]]; then
        PYTHON="$MEGABAGEL_PYTHON"
        is_recent_python "$PYTHON" || fail "MEGABAGEL_PYTHON is $PYTHON, which is no Python of version 3.10 or newer: give another one or leave the variable out."
        return
    fi
    choose_python
    prefix="$("$PYTHON" -c 'import sys; print(sys.prefix)')"
    # Installed again only when setup.py, csrc/, MEGABAGEL_CUDA_ARCHS, the place of this repository or the extra changes.
    stamp="$prefix/.megabagel-$("$PYTHON" - "$REPOSITORY" "$extra" "${MEGABAGEL_CUDA_ARCHS-default}" <<'PY'
import hashlib, pathlib, sys
repository, extra, archs = sys.argv[1:]
sources = [path for path in sorted(pathlib.Path(repository, "csrc").rglob("*")) if path.suffix in (".cpp", ".h", ".cu", ".cuh", ".py")]
content = b"".join(path.read_bytes() for path in [pathlib.Path(repository, "setup.py"), *sources])
print(hashlib.sha256(content + f"{repository} {extra} {archs}".encode()).hexdigest()[:16])
PY
)"
    if [[ -e "$stamp" ]] && has_torch "$PYTHON"; then return; fi
    check_machine "$prefix"
    install "$extra"
    rm -f "$prefix"/.megabagel-* 2>/dev/null || true  # of what was installed before
    touch "$stamp" 2>/dev/null || true  # a read-only environment is checked again next time
}

# Sets PYTHON: the active environment's, or that of .venv, which is made when it is not there.
choose_python() {
    local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" base="" recent="" candidate
    if [[ -n "$active" && -x "$active/bin/python" ]]; then
        PYTHON="$active/bin/python"
        is_recent_python "$PYTHON" || fail "the active environment $active has $("$PYTHON" --version 2>&1), but megabagel needs Python 3.10 or newer: deactivate it or make one with a newer Python."
        return
    fi
    PYTHON="$REPOSITORY/.venv/bin/python"
    if [[ -x "$PYTHON" ]] && is_recent_python "$PYTHON"; then return; fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if ! is_recent_python "$candidate"; then continue; fi
        recent="$candidate"
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then base="$candidate"; break; fi
    done
    [[ -n "$recent" ]] || fail "no Python 3.10 or newer was found on PATH: install one (Debian and Ubuntu: 'apt-get install python3 python3-venv') and run this again."
    [[ -n "$base" ]] || fail "$recent cannot make virtual environments: install its venv module (Debian and Ubuntu: 'apt-get install python3-venv') and run this again."
    say "Making a virtual environment in $REPOSITORY/.venv with $("$base" --version)"
    local options=()
    # In a container whose Python already has torch, the environment sees that torch.
    if has_torch "$base"; then options+=(--system-site-packages); fi
    "$base" -m venv --clear ${options[@]+"${options[@]}"} "$REPOSITORY/.venv" || fail "$base could not make $REPOSITORY/.venv (its message is above): remove that folder and run this again."
}

check_machine() {
    local free compiler
    free="$("$PYTHON" -c 'import shutil, sys; print(shutil.disk_usage(sys.argv[1]).free // 10**9)' "$1")"
    [[ "$free" -ge "$DISK_GB" ]] || fail "only $free GB are free where $1 lies, but the installation needs $DISK_GB GB: free some space or move the repository."
    for compiler in "${CXX:-g++}" clang++; do
        if command -v "$compiler" >/dev/null; then return; fi
    done
    say "note: no C++ compiler was found; training works without, only torch.compile and building operators need one (Debian and Ubuntu: 'apt-get install g++')."
}

install() {
    local extra="$1" pins
    pins="$(mktemp)"
    if has_torch "$PYTHON"; then
        say "Keeping the torch that is already there: $("$PYTHON" -c 'import torch; print(torch.__version__)')"
    else
        say "Installing $TORCH_REQUIREMENT (the largest download, 0.2 GB for CPUs and about 3 GB for NVIDIA GPUs)"
        if ! command -v nvidia-smi >/dev/null && [[ -z "${TORCH_INDEX_URL:-}" ]]; then
            echo "No NVIDIA GPU here: setting TORCH_INDEX_URL to PyTorch's CPU wheel index makes this download smaller."
        fi
        pip_install "$TORCH_REQUIREMENT" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
    fi
    "$PYTHON" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$pins"
    say "Installing megabagel and what it needs"
    pip_install "setuptools>=64" wheel ninja pybind11  # what builds csrc/
    pip_install --constraint "$pins" --no-build-isolation --editable "$REPOSITORY${extra:+[$extra]}"
    rm -f "$pins"
}

pip_install() {
    "$PYTHON" -m pip install --disable-pip-version-check "$@" || fail "pip could not install what is needed (its message is above): check the network, or give another index with PIP_INDEX_URL, and run this again."
}
