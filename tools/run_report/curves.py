"""Curves of a run as SVG to stand inside a page, whose style sheet gives their colours (light and dark)."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MOST_POINTS = 800  # of a curve; of longer ones the mean of neighbours is drawn
COLOURS = tuple(f"#0000{number:02x}" for number in range(1, 9))  # stand for var(--c1) ...
_INK, _RULE = "#0000f1", "#0000f2"
Points = Sequence[tuple[float, float]]


def points_of(records: Sequence[Mapping], name: str) -> list[tuple[float, float]]:
    """Step and value where there is one."""
    return [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most MOST_POINTS, each the mean of as many neighbours."""
    width = -(-len(points) // MOST_POINTS)
    groups = [points[i : i + width] for i in range(0, len(points), width)] if points else []
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def smoothed(points: Points) -> list[tuple[float, float]]:
    """Mean over a window around each point, a twentieth of the curve wide, shorter at both ends."""
    half = max(1, len(points) // 40)
    windows = [points[max(0, i - half) : i + half + 1] for i in range(len(points))]
    return [(x, sum(y for _, y in w) / len(w)) for (x, _), w in zip(points, windows, strict=True)]


def draw(curves: Mapping[str, Points], marks: Sequence[float] = (), log: bool = False, dots: Sequence[str] = ()) -> str:
    """The SVG element of curves by their names, of which some hold points. `marks`: steps with a vertical line. `dots`:
    names of curves that are drawn point by point."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": "run", "font.size": 9, "text.color": _INK}
    settings |= {"axes.edgecolor": _RULE, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK}
    with plt.rc_context(settings):
        figure, axis = plt.subplots(figsize=(5.4, 2.5), layout="constrained")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.grid(color=_RULE, linewidth=0.6)
        axis.set_axisbelow(True)
        shown = [(name, points) for name, points in curves.items() if points]
        ordered = len(shown) > len(COLOURS)  # bins of one quantity: one colour that deepens
        for number, (name, points) in enumerate(shown):
            colour = COLOURS[0 if ordered else number]
            alpha = (number + 2) / (len(shown) + 1) if ordered else 1.0
            if name in dots:
                axis.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, linewidth=1, label=name)
                continue
            thin = thinned(points)
            if len(shown) < 3:
                axis.plot(*zip(*thin, strict=True), color=colour, linewidth=0.8, alpha=0.3)
            axis.plot(*zip(*smoothed(thin), strict=True), color=colour, alpha=alpha, linewidth=1.5, label=name)
        for mark in marks:
            axis.axvline(mark + 0.5, color=_INK, linewidth=0.8, linestyle=(0, (1, 3)), alpha=0.7)
        if log and all(y > 0 for _, points in shown for _, y in points):
            axis.set_yscale("log")
        if len(shown) > 1:
            above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
            axis.legend(fontsize=8, frameon=False, ncols=5 if ordered else 4, handlelength=1.2, **above)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return _for_page(buffer.getvalue())


def _for_page(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg class="curve" \1 role="img">', svg, count=1, flags=re.S)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    for number, colour in enumerate(COLOURS, 1):
        svg = svg.replace(colour, f"var(--c{number})")
    return svg.replace(_INK, "var(--soft)").replace(_RULE, "var(--rule)")
