"""Compares what the ranks computed with what the case expects, group by group. It computes nothing of the model."""

import math
import re

import torch
from torch import Tensor

from parity.case import Case
from parity.compare import Group, Report, assemble, compare, compare_number
from parity.infer import judge_inference
from parity.train import Results

FORWARD, GRADIENT, TRAJECTORY, WEIGHTS = 1e-4, 1e-4, 1e-4, 1e-3
# softmax does not see a bias of the keys: their true gradient is zero and AdamW with eps 1e-15 walks on rounding noise
_NOISE_ONLY = re.compile(r"vit_model\..*\.self_attn\.k_proj\.bias")
_FORWARD_GROUPS = {
    "packed_timesteps_shifted": ("timesteps", "timesteps"),
    "timestep_embeds": ("timesteps", "timestep_embeds"),
    "vit_last_hidden": ("vit", "vit_last_hidden"),
    "vit_connector_out": ("vit", "vit_connector_out"),
    "llm_input": ("llm_input", "llm_input"),
    "last_hidden_state": ("last_hidden_state", "last_hidden_state"),
    "ce": ("ce", "ce"),
    "mse": ("mse", "mse"),
}


def judge(case: Case, results: Results, report: Report) -> None:
    """Add every group but the autoencoder's to `report`."""
    _forward(case, results, report)
    _losses(case, results, report)
    _gradients(case, results, report)
    _trajectory(case, results, report)
    _weights(case, results, report)
    if results.inference is not None:
        judge_inference(case, results.inference, report, FORWARD)


def _forward(case: Case, results: Results, report: Report) -> None:
    for key, expected in case.expected.items():
        name = key.removeprefix("fwd.")
        if not key.startswith("fwd.") or name == "noise":
            continue
        group, ours = ("layer_out", name) if name.startswith("layer_out.") else _FORWARD_GROUPS[name]
        group = report.group(group, FORWARD, floor=0.1)
        copies = results.rows.get(ours)
        if not copies:
            compare(group, key, None if expected.numel() else expected, expected)
            continue
        for parts in copies.values():
            compare(group, key, assemble(parts, len(expected)), expected)
    if "fwd.mse" in case.expected:
        for parts in results.rows.get("mse_mean", {}).values():
            mean = case.expected["fwd.mse"].mean(dim=-1)
            compare(report.group("mse", FORWARD, floor=0.1), "fwd.mse (mean)", assemble(parts, len(mean)), mean)


def _losses(case: Case, results: Results, report: Report) -> None:
    """Reduced losses of the recorded step and its gradient norm."""
    group, expected = report.group("losses", FORWARD), case.meta["losses"]
    ce, mse = results.losses.ce or 0.0, results.losses.mse or 0.0
    weights = case.batch.get("ce_loss_weights", torch.zeros(0)).double()
    lengths = {"ce": len(weights), "mse_mean": len(case.batch.get("mse_loss_indexes", ()))}
    rows = {name: _whole(results, name, length) for name, length in lengths.items()}
    # replicas hold disjoint parameters' copies of the same gradient: one copy of each counts
    norm = math.sqrt(sum(copies[0].double().square().sum().item() for copies in results.gradients.values()))
    found = {
        "ce": ce,
        "mse": mse,
        "loss": ce + mse,
        "grad_norm": norm,
        "n_ce_tokens": len(rows["ce"]),
        "n_mse_tokens": len(rows["mse_mean"]),
        "ce_sum": rows["ce"].sum().item(),
        "mse_mean_sum": rows["mse_mean"].sum().item(),
    }
    if len(weights):
        found["ce_reweighted"] = ((rows["ce"] * weights).sum() / weights.sum()).item()
    for name, value in expected.items():
        if name in found and value is not None:
            compare_number(group, f"losses.{name}", found[name], value)


def _whole(results: Results, name: str, length: int) -> Tensor:
    """The values of a loss over all replicas in the saved order, from tensor-parallel rank 0: float64 [length]."""
    rows = assemble(results.rows.get(name, {}).get(0, []), length)
    return torch.zeros(0).double() if rows is None else rows.double()


def _gradients(case: Case, results: Results, report: Report) -> None:
    group = report.group("gradients", GRADIENT, floor=1.0)
    norm = case.meta["losses"]["grad_norm"] or 1.0
    for key, expected in case.expected.items():
        if key.startswith("grad.") and not _NOISE_ONLY.search(key):
            for copy in results.gradients.get(key.removeprefix("grad."), [None]):
                compare(group, key, copy, expected)
    for name, copies in results.gradients.items():
        if f"grad.{name}" not in case.expected or _NOISE_ONLY.search(name):
            # nothing is expected: whatever is there must be rounding noise beside the whole gradient
            compare_number(group, f"grad.{name} (zero)", max(c.abs().max().item() for c in copies), 0.0, norm)


def _trajectory(case: Case, results: Results, report: Report) -> None:
    group = report.group("trajectory", TRAJECTORY)
    for number, expected in enumerate(case.meta["trajectory"]["steps"]):
        found = results.steps[number] if number < len(results.steps) else None
        loss = None if found is None else (found.ce or 0.0) + (found.mse or 0.0)
        for key, value in (
            ("ce", found and found.ce),
            ("mse", found and found.mse),
            ("loss", loss),
            ("grad_norm_before_clip", found and found.grad_norm),
        ):
            if expected.get(key) is not None:
                compare_number(group, f"trajectory.steps[{number}].{key}", value, expected[key])


def _weights(case: Case, results: Results, report: Report) -> None:
    """Weights and moving average after the trajectory, relative to how far the weights moved."""
    for kind, found in (("final", results.final), ("ema", results.ema)):
        group = report.group(kind, WEIGHTS, floor=1.0)
        for key, expected in case.expected.items():
            name = key.removeprefix(f"{kind}.")
            if not key.startswith(f"{kind}.") or _NOISE_ONLY.search(name):
                continue
            for initial, copy in zip(results.initial.get(name, [expected]), found.get(name, [None]), strict=True):
                compare(group, key, copy, expected, scale=expected - initial)
    for name, stats in case.meta["trajectory"].get("tensor_stats", {}).items():
        if name in results.final and not _NOISE_ONLY.search(name):
            _statistics(report, name, results.initial[name][0], results.final[name][0], results.ema[name][0], stats)


def _statistics(report: Report, name: str, initial: Tensor, final: Tensor, ema: Tensor, stats: dict) -> None:
    """L2 norms and sums that the case gives for every tensor, also for those whose values it does not."""
    initial, final, ema = initial.double(), final.double(), ema.double()
    for kind, tensor in (("final", final), ("ema", ema)):
        group: Group = report.group(kind, WEIGHTS)
        for key, value in ((f"{kind}_l2", tensor.norm().item()), (f"{kind}_sum", tensor.sum().item())):
            compare_number(group, f"tensor_stats.{name}.{key}", value, stats[key], stats["update_l2"] or None)
    moved = (final - initial).norm().item()
    compare_number(report.group("final", WEIGHTS), f"tensor_stats.{name}.update_l2", moved, stats["update_l2"])
