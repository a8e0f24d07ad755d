"""The run in TensorBoard under the tag names that Megatron's users and BAGEL's users know.

Megatron's tags have a twin ` vs samples` whose x-axis counts samples. Steps repeated after a crash are drawn twice:
TensorBoard can only forget by x-value, which would delete the twins' history; `metrics.jsonl` has each step once.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

_MEGATRON = {  # tag -> name in the record; loss keys are tags of both
    "learning-rate": "lr",
    "batch-size": "batch_size",
    "grad-norm": "grad_norm",
    "params-norm": "params_norm",
    "iteration-time": "step_time",
    "throughput": "tflops_per_device",
    "encode-balance": "encode_balance",
    "mem-allocated-bytes": "memory_bytes",
    "skipped-train-samples": "skipped_samples",
    "nonfinite-steps": "nonfinite_steps",
    "ce": "ce",
    "mse": "mse",
    "load_balancing_loss": "moe_aux_loss",
    "z_loss": "moe_z_loss",
    "save-checkpoint-time": "save_time",
    "save-checkpoint-blocked-time": "save_blocked_time",
}
_BAGEL = {
    "lr": "lr",
    "total_norm": "grad_norm",
    "total_mse_tokens": "mse_tokens",
    "total_ce_tokens": "ce_tokens",
    "total_samples": "samples",
    "tokens_per_sec": "tokens_per_sec",
    "tokens_per_step": "tokens",
    "actual_tflops": "tflops_per_device",
    "mfu": "mfu",
}
_TAGS = ("data/", "validation/")  # names in the record that begin with them are tags as they are
_BAGEL_MEBIBYTES = {"mem_allocated": "memory_bytes", "mem_cache": "reserved_bytes"}


class TensorBoard:
    """Event files of one run. `config_yaml` is shown in the text tab."""

    def __init__(self, folder: Path, config_yaml: str) -> None:
        self._writer = SummaryWriter(str(folder))
        self._writer.add_text("config", "    " + config_yaml.replace("\n", "\n    "))  # indented: code in Markdown

    def write(self, step: int, record: Mapping[str, float | None]) -> None:
        """Scalars of step `step`; what is absent or None in `record` is left out."""
        samples = record.get("samples_seen")
        for tag, name in (_MEGATRON | _BAGEL).items():
            if (value := record.get(name)) is not None:
                self._writer.add_scalar(tag, value, step)
                if tag in _MEGATRON and samples is not None:
                    self._writer.add_scalar(f"{tag} vs samples", value, int(samples))
        for tag, name in _BAGEL_MEBIBYTES.items():
            if (value := record.get(name)) is not None:
                self._writer.add_scalar(tag, value / 2**20, step)
        for name, value in record.items():
            if name.startswith(_TAGS) and value is not None:
                self._writer.add_scalar(name, value, step)

    def write_sample(self, step: int, name: str, picture: Image.Image | None, answer: str | None) -> None:
        """A picture or an answer that the model gave after step `step`; `name` stays the same over the steps."""
        if picture is not None:
            self._writer.add_image(f"samples/{name}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        else:
            self._writer.add_text(f"samples/{name}", answer, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
