"""Golden cases in several layouts by the processes of one launch (a start costs more than a case); prints JSON lines.

parity_program.py layouts JOB...        JOB: name of a case, then options of tools/check_parity.py, in one argument
parity_program.py sensitivity           one process: which altered expected values go unnoticed
"""

import copy
import json
import sys
import warnings
from pathlib import Path

import torch
from megatron.core import parallel_state

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from check_parity import parse  # noqa: E402
from parity.autoencoder import check_autoencoder  # noqa: E402
from parity.case import Case, load_case, run_config  # noqa: E402
from parity.compare import Report  # noqa: E402
from parity.judge import FORWARD, judge  # noqa: E402
from parity.layout import parallel_config, training_settings, world_size  # noqa: E402
from parity.train import Results, Runner  # noqa: E402

from megabagel.runtime.distributed import destroy, initialize  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"


def run(case: Case, options: list[str]) -> Results | None:
    layout = parse([str(case.folder), *options])
    config = run_config(case, parallel_config(layout), world_size(layout), training_settings(layout))
    results = Runner(case, config, initialize(config.parallel, seed=0)).run()
    parallel_state.destroy_model_parallel()
    return results


def layouts(jobs: list[str]) -> None:
    for job in jobs:
        name, *options = job.split()
        case = load_case(GOLDEN / name)
        results = run(case, options)
        if results is not None:
            report = Report()
            judge(case, results, report)
            print(json.dumps({"job": job, "pass": report.passed, **report.as_json()}), flush=True)


def altered(case: Case) -> list[tuple[str, Case]]:
    """The case with one expected value changed by 1 %, for every kind of value."""
    tensors = [k for k in case.expected if k.startswith(("vae.", "fwd.")) and k not in ("vae.latent", "fwd.noise")]
    for kind in ("grad.", "final.", "ema."):
        names = [k for k in case.expected if k.startswith(kind) and ".k_proj.bias" not in k]
        tensors += names[:: len(names) // 12]
    inferred = [k for k, v in case.expected.items() if k.startswith("infer.") and v.is_floating_point()]
    tensors += [k for k in inferred if not k.endswith("noise")]
    changes = []
    for name in tensors:
        expected = dict(case.expected)
        expected[name] = expected[name] * 1.01
        # a single entry counts as well: one of the larger ones
        single = dict(case.expected)
        single[name] = single[name].clone()
        single[name].view(-1)[single[name].abs().argmax()] *= 1.01
        changes += [(name, Case(case.folder, case.meta, case.batch, expected))]
        changes += [(f"{name} (one entry)", Case(case.folder, case.meta, case.batch, single))]
    for path in [("losses", key) for key in case.meta["losses"]] + [
        ("trajectory", "steps", step, key) for step in (0, 4) for key in ("ce", "mse", "loss", "grad_norm_before_clip")
    ]:
        meta = copy.deepcopy(case.meta)
        holder = meta
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] *= 1.01
        changes.append((".".join(map(str, path)), Case(case.folder, meta, case.batch, case.expected)))
    return changes


def sensitivity() -> None:
    case = load_case(GOLDEN / "public-basic")
    results = run(case, [])
    unnoticed, changes = [], altered(case)
    for name, changed in changes:
        report = Report()
        if name.startswith("vae."):
            check_autoencoder(changed, report, FORWARD)
        else:
            judge(changed, results, report)
        if report.passed:
            unnoticed.append(name)
    print(json.dumps({"changes": len(changes), "unnoticed": unnoticed}))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    layouts(sys.argv[2:]) if sys.argv[1] == "layouts" else sensitivity()
    destroy()
