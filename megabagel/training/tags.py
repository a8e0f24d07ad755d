"""The names under which logs for people show what a step measured: those that Megatron's and BAGEL's users know.

Megatron's tags have a twin ` vs samples`, for logs that cannot choose their x-axis. Nothing is written here.
"""

from collections.abc import Mapping

_MEGATRON = {  # tag -> name in the record; loss keys are tags of both
    "learning-rate": "lr",
    "batch-size": "batch_size",
    "grad-norm": "grad_norm",
    "params-norm": "params_norm",
    "iteration-time": "step_time",
    "throughput": "tflops_per_device",
    "encode-balance": "encode_balance",
    "mem-allocated-bytes": "memory_bytes",
    "mem-reserved-bytes": "reserved_bytes",
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
_OURS = {
    "mfu_official": "mfu_official",
    "padding-share": "padding_share",
    "pipeline-bubble-estimate": "bubble_share",
    "data-wait-time": "data_time",
    "encode-time": "encode_time",
    "logging-time": "log_time",
    "ema-distance": "ema_distance",
    "host-memory-bytes": "host_memory_bytes",
    "loss-spikes": "spikes",
    "rollbacks": "rollbacks",
}
_BAGEL_MEBIBYTES = {"mem_allocated": "memory_bytes", "mem_cache": "reserved_bytes"}
# beginnings of names in the record that are tags
_AS_THEY_ARE = ("data/", "straggler/", "validation/", "tokens/", "flops/")
_WITH_TWINS = {"groups/": "groups/", "mse_t0.": "mse_t0.", "grad_norm/": "grad-norm/"}  # the same -> start of the tag


def scalars(record: Mapping[str, float | None]) -> dict[str, float]:
    """Tag -> value; what is absent or None in `record` is left out."""
    found = {tag: record.get(name) for tag, name in (_MEGATRON | _BAGEL | _OURS).items()}
    for tag, name in _BAGEL_MEBIBYTES.items():
        if (value := record.get(name)) is not None:
            found[tag] = value / 2**20
    found |= {name: value for name, value in record.items() if name.startswith(_AS_THEY_ARE)}
    return {tag: value for tag, value in (found | _parts(record)).items() if value is not None}


def twins(record: Mapping[str, float | None]) -> dict[str, float]:
    """Tags of `scalars` that have a twin -> value."""
    found = {tag: record.get(name) for tag, name in _MEGATRON.items()} | _parts(record)
    return {tag: value for tag, value in found.items() if value is not None}


def _parts(record: Mapping[str, float | None]) -> dict[str, float | None]:
    """Losses and norms that are parts of Megatron's."""
    return {
        tag + name.removeprefix(start): value
        for name, value in record.items()
        for start, tag in _WITH_TWINS.items()
        if name.startswith(start)
    }
