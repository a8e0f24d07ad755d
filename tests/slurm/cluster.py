"""A real SLURM of two nodes on this machine: its own munged, slurmctld and slurmd, ports and folders.

Nothing of the system's configuration is touched; what was started is stopped by process id. Both nodes share this
machine's host name: `SLURMD_NODENAME` tells them apart.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun", "scancel")
NODES = ("node1", "node2")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

_SLURM_CONF = """
ClusterName=tests
SlurmctldHost=localhost
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={home}/munge.socket,cred_expire=5
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.%n.log
SlurmdSpoolDir={home}/spool.%n
StateSaveLocation={home}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=300
MinJobAge=600
MessageTimeout=60
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} {shape}
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} {shape}
PartitionName=all Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""
_SHAPE = "CPUs=2 Sockets=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN"


def missing() -> str | None:
    """Which program of SLURM is not installed, if any."""
    return next((name for name in PROGRAMS if shutil.which(name, path=PATH) is None), None)


class Cluster:
    """Start it with `start`, end it with `stop`. `home`: a folder of its own, with a short path (it holds a socket)."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = os.environ | {"PATH": PATH, "SLURM_CONF": str(home / "slurm.conf")}

    def start(self) -> None:
        """Returns when both nodes are idle. Raises RuntimeError with the end of the daemons' logs when they are not."""
        user = getpass.getuser()
        self.home.chmod(0o755)
        (self.home / "munge.key").write_bytes(os.urandom(128))
        (self.home / "munge.key").chmod(0o400)
        ports = _free_ports(3)
        (self.home / "slurm.conf").write_text(_SLURM_CONF.format(user=user, home=self.home, ports=ports, shape=_SHAPE))
        files = {name: self.home / f"munge.{name}" for name in ("socket", "key", "pid", "log", "seed")}
        named = {"socket": "socket", "key": "key-file", "pid": "pid-file", "log": "log-file", "seed": "seed-file"}
        # --force: root is not the user whom munged expects
        self.run("munged", "--force", *(f"--{named[name]}={file}" for name, file in files.items()))
        self.run("slurmctld")
        for node in NODES:
            self.start_node(node)
        try:
            self.wait(lambda: all(self.node_state(node) == "IDLE" for node in NODES), 60, "both nodes are idle")
        except TimeoutError as error:
            logs = [f"{log.name}: {log.read_text()[-2000:]}" for log in sorted(self.home.glob("*.log"))]
            raise RuntimeError("\n".join([str(error), *logs])) from None

    def stop(self) -> None:
        """Every daemon, and what is left of jobs."""
        with contextlib.suppress(RuntimeError, TimeoutError):
            self.run("scancel", "--user", getpass.getuser())
            self.wait(lambda: not self.run("squeue", "--noheader").strip(), 30, "no job runs")
        for node in NODES:
            self._kill_processes_of(node)
        for file in ("slurmd.node1.pid", "slurmd.node2.pid", "slurmctld.pid", "munge.pid"):
            _end(self.home / file)

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """What a command of SLURM prints on standard output; a failure raises with what it says."""
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr}")
        return done.stdout

    def start_node(self, node: str) -> None:
        (self.home / f"spool.{node}").mkdir(exist_ok=True)
        self.run("slurmd", "-N", node)

    def crash_node(self, node: str) -> None:
        """What a power failure does: the daemon and everything that it started are gone, then SLURM notices it."""
        os.kill(_pid(self.home / f"slurmd.{node}.pid"), signal.SIGKILL)
        self._kill_processes_of(node)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crashed")

    def _kill_processes_of(self, node: str) -> None:
        """Of jobs on `node`, the daemons of their steps first: these would tell SLURM how the others ended."""
        for process in sorted(psutil.process_iter(["name"]), key=lambda found: found.info["name"] != "slurmstepd"):
            with contextlib.suppress(psutil.Error):
                is_step = process.info["name"] == "slurmstepd"
                if is_step and str(self.home / f"slurmd.{node}.log") in (file.path for file in process.open_files()):
                    process.kill()
                environment = {} if is_step else process.environ()
                ours = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if ours and environment.get("SLURMD_NODENAME") == node:
                    process.kill()

    def node_state(self, node: str) -> str:
        return self.run("sinfo", "--noheader", "--nodes", node, "--format", "%T").strip().rstrip("*").upper()

    def submit(self, *command: str, cwd: Path | None = None) -> str:
        """The id of a new job: `command` are arguments of sbatch."""
        return self.run("sbatch", "--parsable", *command, cwd=cwd).strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows, by name; a job stays known for minutes after its end."""
        fields = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait_for_end(self, job: str, seconds: float) -> dict[str, str]:
        """The job once it has ended for good."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda: self.job(job)["JobState"] in ended, seconds, f"job {job} has ended")
        return self.job(job)

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Raises TimeoutError when `condition` does not become true. No answer of SLURM is not one either."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                if condition():
                    return
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {seconds:.0f} s still not: {what}\n{self.run('squeue', check=False)}")
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def _pid(file: Path) -> int:
    return int(file.read_text())


def _end(pid_file: Path) -> None:
    """Ask the daemon to end, and see to it after a few seconds."""
    with contextlib.suppress(OSError, ValueError):
        pid = _pid(pid_file)
        os.kill(pid, signal.SIGTERM)
        for _ in range(30):
            time.sleep(0.1)
            os.kill(pid, 0)  # raises once it has gone
        os.kill(pid, signal.SIGKILL)
