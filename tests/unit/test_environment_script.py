"""The installation script says in one sentence what a machine lacks, and leaves the machine alone."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASH = shutil.which("bash")


def prepare(tmp_path: Path, before: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Source a copy of the script in an otherwise empty repository and call it, after the shell code `before`."""
    script = tmp_path / "examples/lib/environment.sh"
    script.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "examples/lib/environment.sh", script)
    shutil.copy(ROOT / "setup.py", tmp_path)
    command = f"set -euo pipefail; source {script}; {before}prepare_environment; echo $PYTHON"
    return subprocess.run([BASH, "-c", command], capture_output=True, text=True, env=environment)


def fake_python(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!{BASH}\n{body}\n")
    path.chmod(0o755)
    return path


def only_error(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line]
    return line


def test_a_machine_without_python(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "dirname").symlink_to(shutil.which("dirname"))
    assert "error: no Python 3.10 or newer was found on PATH: install one" in only_error(
        prepare(tmp_path, PATH=str(tools))
    )


def test_an_active_environment_with_an_old_python(tmp_path):
    fake_python(tmp_path / "old/bin/python", '[[ "$1" == --version ]] && echo Python 3.8.1; exit 1')
    done = prepare(tmp_path, PATH=os.environ["PATH"], VIRTUAL_ENV=str(tmp_path / "old"))
    assert "has Python 3.8.1, but megabagel needs Python 3.10 or newer: deactivate it" in only_error(done)


def test_a_full_disk_ends_before_anything_is_installed(tmp_path):
    # an active environment that has nothing: the real interpreter without its site packages
    python = shutil.which("python3")
    fake_python(tmp_path / "env/bin/python", f'exec {python} -S "$@"')
    done = prepare(tmp_path, "DISK_GB=99999999; ", PATH=os.environ["PATH"], VIRTUAL_ENV=str(tmp_path / "env"))
    assert "but the installation needs 99999999 GB: free some space or move the repository." in only_error(done)


def test_a_torch_that_is_there_is_pinned_while_the_rest_is_installed(tmp_path):
    body = f"""
if [[ "$1" == -m ]]; then echo "$@" >>{tmp_path}/pip.log; while [[ $# -gt 0 ]]; do
  if [[ "$1" == --constraint ]]; then cat "$2" >>{tmp_path}/pip.log; fi; shift; done; exit; fi
if [[ "$1" == -c && "$2" == "import torch"* ]]; then echo 2.9.0a0; exit; fi
if [[ "$1" == -c && "$2" == "from importlib"* ]]; then echo torch==2.9.0a0; exit; fi
exec {shutil.which("python3")} "$@" """
    fake_python(tmp_path / "env/bin/python", body)
    before = f'check_machine() {{ :; }}; touch() {{ echo "stamp $1" >>{tmp_path}/pip.log; }}; '
    done = prepare(tmp_path, before, PATH=os.environ["PATH"], VIRTUAL_ENV=str(tmp_path / "env"))
    assert done.returncode == 0, done.stderr
    assert "Keeping the torch that is already there: 2.9.0a0" in done.stdout
    log = (tmp_path / "pip.log").read_text()
    assert "install --disable-pip-version-check torch" not in log
    assert "--no-build-isolation --editable" in log
    assert "\ntorch==2.9.0a0\n" in log
    assert "stamp " in log
