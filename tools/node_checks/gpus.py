"""What nvidia-smi and the kernel know of a node's GPUs that a run should not start with. No GPU: nothing to say."""

import csv
import io
import shutil
import subprocess

_FIELDS = {  # of `nvidia-smi --query-gpu`; a driver that lacks one says so in its place
    "index": "index",
    "memory.used": "used_mib",
    "ecc.errors.uncorrected.volatile.total": "uncorrected",
    "remapped_rows.failure": "remap_failed",
    "remapped_rows.pending": "remap_pending",
    "clocks_event_reasons.hw_thermal_slowdown": "hot",
}
OCCUPIED_MIB = 2048  # of another process


def faults_of_table(table: str) -> list[str]:
    """Sentences about the rows of nvidia-smi's CSV (no header, no units)."""
    faults = []
    for row in csv.reader(io.StringIO(table), skipinitialspace=True):
        gpu = dict(zip(_FIELDS.values(), row, strict=False))
        where = f"GPU {gpu['index']}"
        if _number(gpu["uncorrected"]) > 0:
            faults.append(f"{where} had {gpu['uncorrected']} uncorrectable memory errors since its driver was loaded.")
        if _is_yes(gpu["remap_failed"]):
            faults.append(f"{where} could not replace a broken memory row: it needs to be exchanged.")
        if _is_yes(gpu["remap_pending"]):
            faults.append(f"{where} waits for a reset to replace a broken memory row.")
        if _is_yes(gpu["hot"]):
            faults.append(f"{where} runs slower because it is too hot.")
        if _number(gpu["used_mib"]) > OCCUPIED_MIB:
            faults.append(f"{where} has {gpu['used_mib']} MiB in use by another process.")
    return faults


def faults(needed: int) -> list[str]:
    """About this node, on which `needed` processes start; [] without an NVIDIA driver. Ask before CUDA is used."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return ["nvidia-smi does not answer: a GPU or its driver hangs."]
    if done.returncode:
        return [f"nvidia-smi fails: {(done.stdout + done.stderr).strip().splitlines()[-1]}"]
    found = faults_of_table(done.stdout)
    count = len(done.stdout.strip().splitlines())
    if count < needed:
        found.append(f"{count} GPUs answer, but {needed} processes start here.")
    return found + _reported_by_the_kernel()


def _reported_by_the_kernel() -> list[str]:
    """The driver's last Xid line, where this user may read the kernel's log."""
    if shutil.which("dmesg") is None:
        return []
    done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=30)
    reports = [line for line in done.stdout.splitlines() if "NVRM: Xid" in line]
    return [f"the NVIDIA driver has reported: {reports[-1].strip()}"] if reports else []


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return 0.0


def _is_yes(text: str) -> bool:
    return text.strip().lower() in ("yes", "1", "active")
