"""The report of a run as one HTML file that needs nothing else."""

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from run_report.account import CAUSES, Account, Attempt
from run_report.curves import draw, points_of

TEMPLATE = "page.html.j2"
MOST_EVENTS = 300
_ORDINARY = ("launch", "start", "save", "end", "recomputed")
_UNTOLD = "still running, or ended without a word"
_LEFT_OUT = ("time", "kind", "rank", "host", "job", "requeue", "restart", "step", "last")


def render(run_dir: Path, account: Account, events: Sequence[dict], config: str, checkpoints: Sequence[dict]) -> str:
    """`checkpoints`: name, href, bytes. `config`: the run's YAML."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    unusual = [event for event in events if event["kind"] not in _ORDINARY]
    shown = [event for event in events if event["kind"] != "save"]
    return environment.get_template(TEMPLATE).render(
        name=run_dir.resolve().name,
        state=_state(account),
        tiles=_tiles(account, events),
        spent=[
            {"cause": cause, "words": words, "seconds": duration(account.spent[cause]), "share": _share(account, cause)}
            for cause, words in CAUSES.items()
            if account.spent[cause] > 0
        ],
        attempts=[_attempt(n, a, n == len(account.attempts)) for n, a in enumerate(account.attempts, 1)],
        charts=_charts(account),
        kinds=Counter(event["kind"] for event in unusual).most_common(),
        events=[_event(event, account) for event in shown[-MOST_EVENTS:]],
        more=max(0, len(shown) - MOST_EVENTS),
        checkpoints=checkpoints,
        config=config,
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def duration(seconds: float) -> str:
    """In two units at most."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _share(account: Account, cause: str) -> float:
    return account.spent[cause] / max(account.wall, 1e-9)


def _state(account: Account) -> str:
    if not account.attempts:
        return "no step yet"
    begin = time.strftime("%Y-%m-%d %H:%M", time.localtime(account.attempts[0].begin))
    fate = account.attempts[-1].fate or _UNTOLD
    return f"began {begin}, lasted {duration(account.wall)}; {fate}"


def _tiles(account: Account, events: Sequence[dict]) -> list[dict]:
    steps, kinds = account.steps, Counter(event["kind"] for event in events)
    tiles = [{"value": f"{steps[-1]['step']:,}" if steps else "0", "label": "steps"}]
    if account.effective is not None:
        tiles.append({"value": f"{account.effective:.1%}", "label": "effective training time"})
    for name, label in (("tokens_per_sec", "tokens per second, median"), ("mfu", "of the peak (MFU), median")):
        if values := [value for _, value in points_of(steps, name)]:
            middle = statistics.median(values)
            tiles.append({"value": f"{middle:.1%}" if name == "mfu" else f"{middle:,.0f}", "label": label})
    if not points_of(steps, "mfu") and (values := [v for _, v in points_of(steps, "tflops_per_device")]):
        tiles.append({"value": f"{statistics.median(values):.3g}", "label": "TFLOP/s per device, median"})
    tiles += [
        {"value": f"{max(len(account.attempts) - 1, 0)}", "label": "restarts", "alarm": len(account.attempts) > 1},
        {"value": f"{kinds['hang']}", "label": "hangs", "alarm": kinds["hang"] > 0},
        {"value": f"{kinds['failure']}", "label": "failures told", "alarm": kinds["failure"] > 0},
        {"value": f"{kinds['nonfinite']}", "label": "steps not finite", "alarm": kinds["nonfinite"] > 0},
    ]
    if steps and (bad := steps[-1].get("skipped_samples")):
        tiles.append({"value": f"{bad:,.0f}", "label": "bad rows of data", "alarm": True})
    return tiles


def _attempt(number: int, attempt: Attempt, is_last: bool) -> dict:
    return {
        "number": number,
        "begin": time.strftime("%m-%d %H:%M:%S", time.localtime(attempt.begin)),
        "where": " ".join(part for part in (attempt.host, attempt.job and f"job {attempt.job}") if part),
        "ranks": attempt.world_size or "",
        "start": duration(attempt.started - attempt.begin) if attempt.started else "never",
        "steps": f"{attempt.first_step + 1}–{attempt.last_step}" if attempt.last_step is not None else "none kept",
        "lasted": duration(max(0.0, attempt.last_alive - attempt.begin)),
        "fate": attempt.fate or (_UNTOLD if is_last else "killed, or its machine was lost"),
    }


def _event(event: dict, account: Account) -> dict:
    details = {name: value for name, value in event.items() if name not in _LEFT_OUT and value not in (None, "", [])}
    begin = account.attempts[0].begin if account.attempts else event["time"]
    text = "; ".join(f"{name} {_words(value)}" for name, value in details.items())
    return {
        "after": duration(max(0.0, event["time"] - begin)),
        "kind": event["kind"],
        "bad": event["kind"] not in _ORDINARY,
        "step": "" if event.get("step") is None else event["step"],
        "where": f"rank {event['rank']} on {event['host']}" if "rank" in event else "",
        "text": text if len(text) < 400 else f"{text[:400]} …",
    }


def _words(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_words(entry) for entry in value)
    if isinstance(value, dict) and "origin" in value:  # a sample
        return f"{value.get('group', '')} {value['origin']}".strip()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _charts(account: Account) -> list[dict]:
    steps = account.steps
    marks = [a.first_step for a in account.attempts[1:] if a.first_step is not None]
    names = sorted({name for record in steps for name in record})

    def parts(start: str, end: str = "") -> dict:
        wanted = [name for name in names if name.startswith(start) and name.endswith(end)]
        return {name[len(start) : len(name) - len(end)]: points_of(steps, name) for name in wanted}

    flow_times = {name.removeprefix("mse_t"): points_of(steps, name) for name in names if name.startswith("mse_t0.")}
    held_out = {"training": "", "held out": "validation/", "held out, average": "validation/ema/"}
    dots = ("held out", "held out, average")
    wanted = [
        (
            "Cross entropy of text",
            "nats per token",
            {label: points_of(steps, f"{start}ce") for label, start in held_out.items()},
        ),
        (
            "Flow error of pictures",
            "mean square",
            {label: points_of(steps, f"{start}mse") for label, start in held_out.items()},
        ),
        ("Cross entropy by task", "nats per token", parts("groups/", "/ce")),
        ("Flow error by task", "mean square", parts("groups/", "/mse")),
        ("Flow error by time", "mean square; 0: picture, 1: noise", flow_times),
        ("Throughput", "tokens per second", {"tokens/s": points_of(steps, "tokens_per_sec")}),
        (
            "Time of a step",
            "seconds",
            {
                "step": points_of(steps, "step_time"),
                "waiting for data": points_of(steps, "data_time"),
                "encoding": points_of(steps, "encode_time"),
            },
        ),
        ("Gradient norm by part", "before clipping", {"all": points_of(steps, "grad_norm"), **parts("grad_norm/")}),
        ("Tokens of a step", "by modality", parts("tokens/")),
        ("Padding", "share of rows", {"padding": points_of(steps, "padding_share")}),
        (
            "Memory of the fullest rank",
            "GiB",
            {
                label: [(step, value / 2**30) for step, value in points_of(steps, name)]
                for label, name in (("host", "host_memory_bytes"), ("GPU", "memory_bytes"))
            },
        ),
        ("Distance of the average", "share of the parameters' norm", {"EMA": points_of(steps, "ema_distance")}),
        ("Learning rate", "", {"lr": points_of(steps, "lr")}),
    ]
    return [
        {"title": title, "unit": unit, "svg": draw(curves, marks, log="norm" in title, dots=dots)}
        for title, unit, curves in wanted
        if any(curves.values())
    ]
