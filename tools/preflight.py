"""Checks the nodes of a run in seconds, before it trains: same code and settings, files, disk, GPUs, network.

    torchrun --nproc_per_node 8 tools/preflight.py --config my.yaml
    python tools/preflight.py --config my.yaml --report preflight.json

Settings are those of megabagel.train. Each fault is one sentence that names node and rank; the run must not start with
it. Slow ranks are named, but stop nothing. The result is an event `preflight` in the run folder and, with --report, a
JSON file; its `code` is of megabagel/runtime/exit_codes.py: 0, 1 (a node or the network), 78 (settings, files, code).
The processes themselves exit with 0, for torchrun would bury the sentences under its own.
"""

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tools")) if path not in sys.path]

from node_checks import gpus, judge, machine  # noqa: E402
from node_checks.meeting import Meeting  # noqa: E402
from node_checks.network import Network  # noqa: E402

from megabagel.config.errors import ConfigError  # noqa: E402
from megabagel.config.load import load_config  # noqa: E402
from megabagel.runtime import events, exit_codes  # noqa: E402

MARK_SECONDS = 15.0  # how long a shared file system may take to show a new file


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="write the result to this JSON file")
    parser.add_argument("--arrive", type=float, default=300.0, help="seconds for all ranks to start (default: 300)")
    parser.add_argument("--measure", type=float, default=120.0, help="seconds for all measurements (default: 120)")
    options, settings = parser.parse_known_args(arguments)
    meeting, start = Meeting(), time.perf_counter()
    if meeting.local_rank == 0:
        facts = _node_facts(meeting, settings)
    else:
        facts = {"node": machine.node_name()}
    meeting.say("facts", facts)
    if meeting.rank:
        if meeting.hear("go", 0, 2 * options.arrive):
            _measure(meeting, options.measure)
        meeting.leave()
        return 0
    result = _lead(meeting, options.arrive, options.measure)
    result["seconds"] = round(time.perf_counter() - start, 2)
    _publish(result, settings, options.report)
    meeting.leave()
    return 0


def _node_facts(meeting: Meeting, settings: list[str]) -> dict:
    found = machine.facts(settings, meeting.size)
    gpu_faults = gpus.faults(meeting.local_size)
    if found["settings"] and not found["faults"]:
        found["faults"].extend(_mark_faults(meeting, load_config(settings).checkpoint.run_dir))
    return found | {"gpu_faults": gpu_faults, "node": machine.node_name()}


def _mark_faults(meeting: Meeting, run_dir: str) -> list[str]:
    """The first rank leaves a file in the run folder; every other node must see it."""
    mark = os.environ.get("TORCHELASTIC_RUN_ID", "") + os.environ.get("SLURM_RESTART_COUNT", "")
    if meeting.rank == 0:
        path = machine.leave_mark(run_dir, mark)
        meeting.say("mark", str(path))
        return []
    path, deadline = Path(str(meeting.hear("mark", 0, 300))), time.monotonic() + MARK_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return [f"{run_dir} is not the folder that the first node sees: it must be on a file system of all nodes."]
        list(path.parent.iterdir())  # asks NFS again
        time.sleep(0.2)
    return []


def _lead(meeting: Meeting, arrive: float, measure: float) -> dict:
    """On the first rank: collect, decide, measure with the others, judge."""
    said, silent = meeting.collect("facts", arrive)
    node_of = {rank: facts["node"] for rank, facts in said.items()}
    nodes = {facts["node"]: facts for facts in said.values() if "code" in facts}
    result = {"code": exit_codes.DONE, "nodes": len(nodes), "ranks": meeting.size, "faults": [], "warnings": []}
    faults = judge.missing(silent, node_of, "start", arrive)
    wrong = judge.by_node({node: facts["faults"] for node, facts in nodes.items()})
    wrong += judge.disagreement({node: facts["code"] for node, facts in nodes.items()}, "code")
    stated = {node: facts["settings"] for node, facts in nodes.items() if facts["settings"]}
    wrong += judge.disagreement(stated, "settings or data files")
    faults += judge.by_node({node: facts["gpu_faults"] for node, facts in nodes.items()})
    meeting.say("go", not faults and not wrong)
    if not faults and not wrong:
        faults = _judged(meeting, node_of, measure, result)
    result["faults"] = [*wrong, *faults]
    result["code"] = exit_codes.GIVE_UP if wrong else exit_codes.FAILED if faults else exit_codes.DONE
    return result


def _judged(meeting: Meeting, node_of: dict[int, str], seconds: float, result: dict) -> list[str]:
    """Measure; what was measured goes into `result`, what must stop the run is returned."""
    _measure(meeting, seconds)
    results, silent = meeting.collect("measured", seconds / 2)  # they began when this rank did, or a little later
    faults = judge.missing(silent, node_of, "finish the measurements", seconds)
    stuck = {rank: found["stuck"] for rank, found in results.items() if "stuck" in found}
    if silent and stuck:
        return faults  # those who wait for the silent ones are not at fault
    for what in sorted(set(stuck.values())):
        ranks = [rank for rank, at in stuck.items() if at == what]
        faults += judge.missing(ranks, node_of, what, seconds)
    faults += [f"{node_of[rank]}: rank {rank}: {found['error']}" for rank, found in results.items() if "error" in found]
    if faults:
        return faults
    faults = judge.wrong_products(results, node_of) + judge.wrong_sums(results, node_of)
    result["warnings"] = judge.slow(results, node_of, "tflops", "it computes", "TFLOP/s")
    result["warnings"] += judge.slow(results, node_of, "link", "its best link has", "GB/s")
    for key in ("tflops", "all_reduce", "link"):
        result[key] = median(found[key] for found in results.values())
    return faults


def _measure(meeting: Meeting, seconds: float) -> None:
    """Say what this rank measured, in a thread with a deadline: a rank that hangs must still be able to say where."""
    found: dict = {"stuck": "connect to the other ranks"}

    def work() -> None:
        try:
            place = (meeting.rank, meeting.size, meeting.local_rank, meeting.local_size)
            network = Network(*place, seconds, meeting.store)
            values = {}
            for what, call in (
                ("multiply matrices", network.compute),
                ("finish an all-reduce", network.all_reduce),
                ("exchange data with its neighbour", network.links),
            ):
                found["stuck"] = what
                values |= call()
            del found["stuck"]
            found.update(values)
        except Exception as error:  # whatever is broken on this node: the first rank says it
            found.pop("stuck", None)
            found["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    meeting.say("measured", dict(found))


def _publish(result: dict, settings: list[str], report: Path | None) -> None:
    if result["code"] == exit_codes.DONE:
        print(
            f"{result['nodes']} nodes, {result['ranks']} ranks are ready: same code and settings, files readable, "
            f"all-reduce right with {result['all_reduce']:.3g} GB/s, links of {result['link']:.3g} GB/s, "
            f"{result['tflops']:.3g} TFLOP/s (medians); {result['seconds']:.1f} s"
        )
    for kind in ("warnings", "faults"):
        for sentence in result[kind]:
            print(f"{'error' if kind == 'faults' else 'warning'}: {sentence}")
    sys.stdout.flush()
    try:
        run_dir = load_config(settings).checkpoint.run_dir
        events.record(run_dir, "preflight", **result)
        for mark in Path(run_dir).glob(".preflight-*"):
            mark.unlink(missing_ok=True)
    except (ConfigError, OSError):  # said above
        pass
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # a thread may still wait for a rank that is gone
