"""The run in Weights & Biases, under the same names as in TensorBoard. Needs the extra `wandb`.

`WANDB_MODE=offline`, `WANDB_ENTITY` and the rest of its environment variables hold; a resumed run continues its own.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import wandb
import yaml
from PIL import Image

from megabagel.training.histograms import EDGES, Histogram
from megabagel.training.tags import scalars

_ID_FILE = "wandb_id"


class WandbLog:
    """One run of `project`, named like its folder. `config_yaml`: shown as its configuration."""

    def __init__(self, project: str, run_dir: Path, config_yaml: str) -> None:
        identity = run_dir / _ID_FILE
        if not identity.exists():
            identity.write_text(secrets.token_hex(4), encoding="utf-8")
        self._run = wandb.init(
            project=project,
            name=run_dir.absolute().name,
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run_dir),
            config=yaml.safe_load(config_yaml),
        )
        self._run.define_metric("*", step_metric="step")  # steps repeated after a crash are not in order

    def write(self, step: int, record: Mapping[str, float | None]) -> None:
        """As TensorBoard's; `samples` is there to be an x-axis."""
        self._run.log({**scalars(record), "step": step, "samples": record.get("samples_seen")})

    def write_sample(self, step: int, name: str, picture: Image.Image | None, answer: str | None) -> None:
        """As TensorBoard's."""
        shown = wandb.Html(answer or "") if picture is None else wandb.Image(picture.convert("RGB"))
        self._run.log({f"samples/{name}": shown, "step": step})

    def write_histogram(self, step: int, name: str, histogram: Histogram) -> None:
        """As TensorBoard's."""
        self._run.log({f"{name} (log2)": wandb.Histogram(np_histogram=(np.asarray(histogram), EDGES)), "step": step})

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()
