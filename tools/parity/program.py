"""What every process of check_parity.py does, from joining the others to the line that rank 0 leaves behind."""

import argparse
import json
import warnings
from pathlib import Path

import torch

from megabagel.checkpoint.errors import CheckpointError
from megabagel.config.errors import ConfigError
from megabagel.runtime import failure
from megabagel.runtime.distributed import destroy, initialize
from parity.autoencoder import check_autoencoder
from parity.case import CaseError, load_case, run_config
from parity.compare import Report
from parity.judge import FORWARD, judge
from parity.layout import data_parallel_size, parallel_config, training_settings, world_size
from parity.train import Runner


def run(options: argparse.Namespace, result: Path) -> None:
    """Check the case on this rank; rank 0 writes `True` or `False` and the JSON line to `result`."""
    warnings.filterwarnings("ignore", module="megatron")
    torch.set_num_threads(1)
    with failure.guard(CaseError, CheckpointError, ConfigError):
        _check(options, result)


def _check(options: argparse.Namespace, result: Path) -> None:
    case = load_case(options.case_dir)
    config = run_config(case, parallel_config(options), world_size(options), training_settings(options))
    layout = initialize(config.parallel, seed=0)
    results = Runner(case, config, layout).run()
    if results is not None:
        report = Report()
        check_autoencoder(case, report, FORWARD)
        judge(case, results, report)
        line = {"case": case.folder.name, "pass": report.passed, "layout": _layout(options), "groups": report.as_json()}
        result.write_text(f"{report.passed} {json.dumps(line)}")
    destroy()


def _layout(options: argparse.Namespace) -> dict:
    """The options as they were understood."""
    given = {name: value for name, value in vars(options).items() if name != "case_dir"}
    return {**given, "data_parallel_size": data_parallel_size(options)}
