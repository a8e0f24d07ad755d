"""The findings as one HTML file that needs nothing else, and as lines for the terminal."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader

from inspection import charts
from inspection.packs_view import NAMES
from inspection.pictures import mode_colours
from inspection.survey import KINDS, GroupSurvey
from inspection.ways import RANKS, WAYS, Way
from megabagel.data.faults import Fault

TEMPLATE = "page.html.j2"


def render(
    title: str,
    subtitle: str,
    surveys: Sequence[GroupSurvey],
    weights: Sequence[float],
    ways: Sequence[Way],
    strategy: str,
    packs: Sequence[dict],
) -> str:
    """`packs`: from `packs_view.view`; `strategy`: that of the configuration; `weights`: of the groups."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    return environment.get_template(TEMPLATE).render(
        title=title,
        subtitle=subtitle,
        tiles=_tiles(surveys, ways, strategy),
        groups=_groups(surveys, weights),
        names=NAMES,
        charts=_charts(surveys),
        packing=[_way(way, strategy) for way in ways],
        packing_note=(
            "Fill: tokens over data.max_num_tokens. Work: floating-point operations of the heaviest of the "
            f"{RANKS} packs of a step over their mean; 1 means that no rank waits. Simulated on the measured samples "
            "in the order of the mixture's draws."
        ),
        ranks=RANKS,
        faults=[{"group": name, **vars(fault)} for name, fault in all_faults(surveys)],
        fault_kinds=Counter(fault.kind for _, fault in all_faults(surveys)).most_common(),
        packs=packs,
        attention_colours=mode_colours(),
    )


def all_faults(surveys: Sequence[GroupSurvey]) -> list[tuple[str, Fault]]:
    """Group name and fault, files first, then rows in the order of the files."""
    return [
        (found.name, fault)
        for found in surveys
        for fault in (*found.file_faults, *sorted(found.faults, key=lambda fault: fault.key or ()))
    ]


def report(surveys: Sequence[GroupSurvey], ways: Sequence[Way], strategy: str, most_faults: int) -> list[str]:
    """Lines for the terminal; at most `most_faults` bad rows."""
    lines = []
    for found in surveys:
        numbers = f"{found.rows:,} rows, {found.measured:,} measured, {len(found.faults):,} bad"
        lines.append(f"{found.name} ({found.format}): {numbers}")
        for name, values in _per_kind(found):
            h = charts.histogram(values)
            numbers = f"median {h.median:,}, mean {h.mean:,.0f}, in {len(values):,} samples"
            lines.append(f"  {name:8} {charts.line(h)}  {numbers}")
    for way in ways:
        chosen = " <- data.packing" if way.strategy == strategy else ""
        work = "" if way.imbalance is None else f", work of {RANKS} ranks {way.imbalance:.3f} (worst {way.worst:.3f})"
        lines.append(f"{WAYS[way.strategy]:22} fill {way.fill:.2%} in {way.packs:,} packs{work}{chosen}")
    faults = all_faults(surveys)
    lines += [f"bad: {name}: {fault}" for name, fault in faults[:most_faults]]
    if len(faults) > most_faults:
        lines.append(f"bad: {len(faults) - most_faults:,} more; the page lists all of them (--html)")
    return lines


def _per_kind(found: GroupSurvey) -> list[tuple[str, np.ndarray]]:
    """Tokens of all samples, then of each kind in the samples that have it."""
    named = [("tokens", found.tokens), *((kind, found.column(kind)) for kind in KINDS)]
    return [(name, values[values > 0]) for name, values in named if (values > 0).any()]


def _tiles(surveys: Sequence[GroupSurvey], ways: Sequence[Way], strategy: str) -> list[dict]:
    bad = len(all_faults(surveys))
    usable = sum(len(found.table) for found in surveys)
    tokens = sum(int(found.tokens.sum()) for found in surveys)
    tiles = [
        {"value": f"{sum(found.rows for found in surveys):,}", "label": f"rows in {len(surveys)} groups"},
        {"value": f"{usable:,}", "label": "usable of those measured"},
        {"value": f"{bad:,}", "label": "bad rows and files", "alarm": bad > 0},
        {"value": f"{tokens / max(usable, 1):,.0f}", "label": "tokens per sample, mean"},
    ]
    for way in ways:
        if way.strategy == strategy:
            tiles.append({"value": f"{way.fill:.1%}", "label": f"of a pack filled, {WAYS[strategy]}"})
            if way.imbalance is not None:
                tiles.append({"value": f"{way.imbalance:.3f}", "label": f"heaviest of {RANKS} ranks over the mean"})
    return tiles


def _groups(surveys: Sequence[GroupSurvey], weights: Sequence[float]) -> list[dict]:
    rows = []
    for found, weight in zip(surveys, weights, strict=True):
        total = max(int(found.tokens.sum()), 1)
        samples = max(len(found.table), 1)
        rows.append(
            {
                "name": found.name,
                "format": found.format,
                "rows": found.rows,
                "measured": found.measured,
                "bad": len(found.faults) + len(found.file_faults),
                "drawn": weight / sum(weights),
                "mean": found.tokens.sum() / samples,
                "pictures": found.column("pictures").sum() / samples,
                "learnt": int(found.column("learnt").sum()) / total,
                "shares": [(kind, int(found.column(kind).sum()) / total) for kind in KINDS],
            }
        )
    return rows


def _charts(surveys: Sequence[GroupSurvey]) -> list[dict]:
    return [{"name": found.name, "charts": [_chart(*named) for named in _per_kind(found)]} for found in surveys]


def _chart(kind: str, values: np.ndarray) -> dict:
    h = charts.histogram(values)
    return {
        "kind": kind,
        "name": NAMES.get(kind, "all tokens"),
        "svg": charts.svg(h, kind, "samples"),
        "median": h.median,
        "mean": h.mean,
        "samples": len(values),
    }


def _way(way: Way, strategy: str) -> dict:
    return {**vars(way), "name": WAYS[way.strategy], "chosen": way.strategy == strategy}
