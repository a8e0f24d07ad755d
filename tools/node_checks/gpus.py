"""What nvidia-smi and the kernel know of a node's GPUs that a run should not start with. No GPU: nothing to say."""

import csv
import io
import re
import shutil
import subprocess
from collections.abc import Sequence

USED, UNCORRECTED = "memory.used", "ecc.errors.uncorrected.volatile.total"
REMAP_FAILED, REMAP_PENDING = "remapped_rows.failure", "remapped_rows.pending"
HOT = "clocks_event_reasons.hw_thermal_slowdown"
FIELDS = ("index", USED, UNCORRECTED, REMAP_FAILED, REMAP_PENDING, HOT)  # of `nvidia-smi --query-gpu`
OCCUPIED_MIB = 2048  # of another process


def faults_of_table(table: str, fields: Sequence[str] = FIELDS) -> list[str]:
    """Sentences about the rows of nvidia-smi's CSV of `fields` (no header, no units)."""
    faults = []
    for row in csv.reader(io.StringIO(table), skipinitialspace=True):
        gpu = dict.fromkeys(FIELDS, "") | dict(zip(fields, row, strict=True))
        where = f"GPU {gpu['index']}"
        if _number(gpu[UNCORRECTED]) > 0:
            faults.append(f"{where} had {gpu[UNCORRECTED]} uncorrectable memory errors since its driver was loaded.")
        if _is_yes(gpu[REMAP_FAILED]):
            faults.append(f"{where} could not replace a broken memory row: it needs to be exchanged.")
        if _is_yes(gpu[REMAP_PENDING]):
            faults.append(f"{where} waits for a reset to replace a broken memory row.")
        if _is_yes(gpu[HOT]):
            faults.append(f"{where} runs slower because it is too hot.")
        if _number(gpu[USED]) > OCCUPIED_MIB:
            faults.append(f"{where} has {gpu[USED]} MiB in use by another process.")
    return faults


def faults(needed: int) -> list[str]:
    """About this node, on which `needed` processes start; [] without an NVIDIA driver. Ask before CUDA is used."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done, fields = _ask(list(FIELDS))
    except subprocess.TimeoutExpired:
        return ["nvidia-smi does not answer: a GPU or its driver hangs."]
    if done.returncode:
        return [f"nvidia-smi fails: {(done.stdout + done.stderr).strip().splitlines()[-1]}"]
    found = faults_of_table(done.stdout, fields)
    count = len(done.stdout.strip().splitlines())
    if count < needed:
        found.append(f"{count} GPUs answer, but {needed} processes start here.")
    return found + _reported_by_the_kernel()


def _ask(fields: list[str]) -> tuple[subprocess.CompletedProcess, list[str]]:
    """nvidia-smi's answer and the fields that it is about: a driver may not know all."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    unknown = re.search(r'Field "(.+?)" is not a valid field', done.stdout + done.stderr)
    if done.returncode and unknown and unknown[1] in fields:
        return _ask([field for field in fields if field != unknown[1]])
    return done, fields


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
