"""Starts a file or module on several ranks and hands back what it said; used by all distributed tests."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.distributed import forked

ROOT = forked.ROOT


def launch(
    target: str | Path, *args: object, processes: int, timeout: float = 120, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `target`, a .py file or the dotted name of a module, under torchrun from the repository's root.

    Returns its exit code and, in `stdout`, both streams as they came. All its processes are ended after `timeout`
    seconds, and TimeoutError then carries the output so far.
    """
    target = str(target)
    program = [target] if target.endswith(".py") else ["-m", target]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *program]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(env or {})}
    process = subprocess.Popen(
        [*command, *map(str, args)],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        try:
            output, _ = process.communicate(timeout=5)
        except subprocess.TimeoutExpired as error:  # something outside of its process group holds the pipe
            output = (error.output or b"").decode(errors="replace")
        raise TimeoutError(f"{target} ran longer than {timeout} s; its output:\n{output}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def launch_ok(target: str | Path, *args: object, processes: int, timeout: float = 120) -> str:
    """What `target` prints on ranks that are forked instead of started by torchrun (seconds less of imports for each).

    Fails the test with the whole output when the program fails.
    """
    result = forked.run(str(target), *map(str, args), processes=processes, timeout=timeout)
    assert result.returncode == 0, result.stdout
    return result.stdout
