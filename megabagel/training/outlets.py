"""Where logs for people go: TensorBoard, Weights & Biases, Prometheus. None of them can stop a run.

An outlet that fails is dropped with one warning; `metrics.jsonl`, which everything else is made from, is not one.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path

from megabagel.config.schema import LoggingConfig

logger = logging.getLogger(__name__)
TENSORBOARD_FOLDER = "tensorboard"


class Outlets:
    """Those that `config` asks for, which need their packages only then."""

    def __init__(self, config: LoggingConfig, run_dir: Path, config_yaml: str) -> None:
        self._open: dict[str, object] = {}
        if config.tensorboard:
            self._try("TensorBoard", lambda: self._tensorboard(run_dir, config_yaml))
        if config.wandb_project:
            self._try("Weights & Biases", lambda: self._wandb(config.wandb_project, run_dir, config_yaml))
        if config.prometheus_port is not None:
            self._try("Prometheus", lambda: self._prometheus(config.prometheus_port, run_dir))

    def call(self, method: str, *arguments: object) -> None:
        """Call `method` of every outlet that has it."""
        for name, outlet in list(self._open.items()):
            if hasattr(outlet, method):
                self._try(name, functools.partial(getattr(outlet, method), *arguments))

    def close(self) -> None:
        """Flush and close all; safe to call twice."""
        self.call("close")
        self._open.clear()

    def _tensorboard(self, run_dir: Path, config_yaml: str) -> None:
        from megabagel.training.tensorboard import TensorBoard

        self._open["TensorBoard"] = TensorBoard(run_dir / TENSORBOARD_FOLDER, config_yaml)

    def _wandb(self, project: str, run_dir: Path, config_yaml: str) -> None:
        from megabagel.training.wandb_log import WandbLog

        self._open["Weights & Biases"] = WandbLog(project, run_dir, config_yaml)

    def _prometheus(self, port: int, run_dir: Path) -> None:
        from megabagel.training.prometheus import Prometheus

        self._open["Prometheus"] = Prometheus(port, run_dir.absolute().name)

    def _try(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # whatever a service or its library does, training goes on
            self._open.pop(name, None)
            logger.warning("%s failed and gets nothing more of this run: %s: %s", name, type(error).__name__, error)
