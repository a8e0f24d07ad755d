"""Histograms as inline SVG and as lines of text. Colours come from the page's style sheet by class name."""

from dataclasses import dataclass
from html import escape

import numpy as np

BARS = " ▁▂▃▄▅▆▇█"
_FEWEST_BINS = 12  # a single bar across the chart would say nothing


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` values lie in edges[i] .. edges[i + 1], the last bin closed at both ends."""

    counts: tuple[int, ...]
    edges: tuple[int, ...]
    median: int
    mean: float


def histogram(values: np.ndarray, bins: int = 32) -> Histogram:
    """Bins of equal width of whole numbers, at least a dozen, from 0 or near the smallest value where all are large.
    `values` is not empty."""
    low, high = int(values.min()), int(values.max())
    low = 0 if low < high / 3 else low
    width = max(1, -(-(high - low + 1) // bins))
    used = -(-(high - low + 1) // width)
    spare = max(_FEWEST_BINS - used, 0)
    low = max(0, low - spare // 2 * width)
    edges = low + width * np.arange(used + spare + 1)
    counts, _ = np.histogram(values, edges)
    return Histogram(tuple(counts.tolist()), tuple(edges.tolist()), int(np.median(values)), float(values.mean()))


def line(h: Histogram) -> str:
    """The histogram as block characters between its ends. A bin that is not empty is never blank."""
    most = max(h.counts)
    cells = [BARS[0 if not n else max(1, round(n / most * (len(BARS) - 1)))] for n in h.counts]
    return f"{h.edges[0]:,} |{''.join(cells)}| {h.edges[-1] - 1:,}"


def svg(h: Histogram, kind: str, label: str) -> str:
    """Bars with tooltips and a mark at the median, 320 x 110 units; `kind` is the class of the bars, `label` what is
    counted."""
    width, height, foot = 320, 110, 22
    most, step = max(h.counts), width / len(h.counts)
    parts = []
    for i, n in enumerate(h.counts):
        if n:
            tall = max(1.5, (height - foot) * n / most)
            top, tip = height - foot - tall, f"{n:,} {label} of {h.edges[i]:,} to {h.edges[i + 1] - 1:,} tokens"
            bar = f'<rect x="{i * step:.1f}" y="{top:.1f}" width="{max(step - 1, 1):.1f}" height="{tall:.1f}" rx="1">'
            parts.append(f"{bar}<title>{escape(tip)}</title></rect>")
    middle = width * (h.median - h.edges[0]) / max(h.edges[-1] - h.edges[0], 1)
    base = height - foot
    parts.append(f'<line class="median" x1="{middle:.1f}" x2="{middle:.1f}" y1="0" y2="{base}"/>')
    parts.append(f'<line class="axis" x1="0" x2="{width}" y1="{base}" y2="{base}"/>')
    parts.append(f'<text x="0" y="{height - 4}">{h.edges[0]:,}</text>')
    parts.append(f'<text x="{width}" y="{height - 4}" text-anchor="end">{h.edges[-1] - 1:,}</text>')
    described = f"{label}, median {h.median:,} tokens"
    frame = f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(described)}">'
    return f"{frame}{''.join(parts)}</svg>"
