"""The run in TensorBoard, under the names of `tags.py`.

Steps repeated after a crash are drawn twice: TensorBoard can only forget by x-value, which would delete the history of
what is drawn over samples; `metrics.jsonl` has each step once.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from megabagel.training.histograms import EDGES, Histogram
from megabagel.training.tags import scalars, twins


class TensorBoard:
    """Event files of one run. `config_yaml` is shown in the text tab."""

    def __init__(self, folder: Path, config_yaml: str) -> None:
        self._writer = SummaryWriter(str(folder))
        self._writer.add_text("config", "    " + config_yaml.replace("\n", "\n    "))  # indented: code in Markdown

    def write(self, step: int, record: Mapping[str, float | None]) -> None:
        """Scalars of step `step`; what is absent or None in `record` is left out."""
        for tag, value in scalars(record).items():
            self._writer.add_scalar(tag, value, step)
        if (samples := record.get("samples_seen")) is not None:
            for tag, value in twins(record).items():
                self._writer.add_scalar(f"{tag} vs samples", value, int(samples))

    def write_sample(self, step: int, name: str, picture: Image.Image | None, answer: str | None) -> None:
        """A picture or an answer that the model gave after step `step`; `name` stays the same over the steps."""
        if picture is not None:
            self._writer.add_image(f"samples/{name}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        else:
            self._writer.add_text(f"samples/{name}", answer, step)

    def write_histogram(self, step: int, name: str, histogram: Histogram) -> None:
        """Of the base-2 logarithm of magnitudes."""
        counts = np.asarray(histogram)
        middles = (EDGES[:-1] + EDGES[1:]) / 2
        self._writer.add_histogram_raw(
            f"{name} (log2)",
            min=EDGES[0],
            max=EDGES[-1],
            num=counts.sum(),
            sum=(counts * middles).sum(),
            sum_squares=(counts * middles**2).sum(),
            bucket_limits=EDGES[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
