"""tools/bench_layers.py on this GPU: decoder layers of BAGEL-7B's shape beside gather and scatter."""

import torch

from gpu.programs import run_tool
from gpu.report import Report

AGREE = 3e-2  # relative difference of both decoders in bfloat16
SPEED_UP, MFU = 1.3, 0.45


def run(report: Report, device: torch.device) -> None:
    report.begin("layers")
    line, said = run_tool("bench_layers.py")
    if line is None:
        report.row("layers", False, said=said)
        return
    shape = {"layers": line["layers"], "tokens": line["tokens"]}
    report.row("outputs and gradients agree", line["difference"] <= AGREE, error=line["difference"], **shape)
    for name, values in line["values"].items():
        report.row(name, None, **values)
    report.measured("speed-up over gather and scatter", line["ratios"]["speed-up over gather and scatter"], SPEED_UP)
    ours = line["values"]["two streams"]
    if "MFU mask-aware" in ours:
        report.measured("MFU mask-aware", ours["MFU mask-aware"], MFU, official=ours["MFU official"])
    else:
        report.skip("the peak of this GPU is not in megabagel/training/flops.py, so there is no MFU.")
