"""Pictures as SVG inside a page: drawn in the page's own colours, so that dark mode and print need no other ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

__all__ = ["loss_chart", "mixture_chart", "sparkline"]

Points = Sequence[tuple[int, float]]

_BANDS = 9


def mixture_chart(weights: Sequence[tuple[int, Mapping[str, float]]], end: int, name: str) -> str:
    """Return the weight of every domain over steps, stacked, with its name at the right edge.

    Parameters
    ----------
    weights : sequence of (int, mapping)
        The step from which a mixture held.
    end : int
        The last step.
    name : str
        Of the picture, for screen readers.
    """
    width, height, left, right, top, bottom = 426, 250, 40, 112, 8, 28
    domains = _largest([mixture for _, mixture in weights])
    bands = {each: [mixture[each] for _, mixture in weights] for each in domains}
    if len(domains) < len(weights[0][1]):
        bands["others"] = [1 - sum(mixture[each] for each in domains) for _, mixture in weights]
    edges = [step for step, _ in weights] + [max(end, weights[-1][0] + 1)]
    x = [left + (width - left - right) * (edge - edges[0]) / (edges[-1] - edges[0]) for edge in edges]

    def y(share: float) -> float:
        return top + (height - top - bottom) * (1 - share)

    below = np.zeros(len(weights))
    parts, labels, middles = [], [], []
    for index, (domain, shares) in enumerate(bands.items()):
        above = below + shares
        upper = [f"{x[k + side]:.1f},{y(above[k]):.1f}" for k in range(len(weights)) for side in (0, 1)]
        lower = [f"{x[k + side]:.1f},{y(below[k]):.1f}" for k in reversed(range(len(weights))) for side in (1, 0)]
        parts.append(f'<polygon class="band c{index % _BANDS}" points="{" ".join(upper + lower)}"/>')
        middles.append(y((above[-1] + below[-1]) / 2))
        labels.append(domain)
        below = above
    places = _apart(middles, 13.5, top + 4, height - bottom)
    for label, middle, place in zip(labels, middles, places, strict=True):
        parts.append(f'<path class="leader" d="M{x[-1]:.1f} {middle:.1f} L{x[-1] + 8:.1f} {place:.1f}"/>')
        parts.append(f'<text x="{x[-1] + 11:.1f}" y="{place + 3.5:.1f}">{escape(_short(label, 16))}</text>')
    for share in (0, 0.5, 1):
        parts.append(f'<text class="end" x="{left - 5}" y="{y(share) + 4:.1f}">{share:.0%}</text>')
    for edge, place, side in ((edges[0], x[0], "start"), (edges[-1], x[-1], "end")):
        parts.append(f'<text class="{side}" x="{place:.1f}" y="{height - 12}">{edge}</text>')
    parts.append(f'<text class="middle" x="{(x[0] + x[-1]) / 2:.1f}" y="{height - 12}">step</text>')
    return _svg(width, height, name, parts)


def loss_chart(lines: Mapping[str, Points], name: str) -> str:
    """Return a few curves over steps; the first is solid, the second dashed, and so on."""
    width, height, left, right, top, bottom = 190, 130, 34, 10, 10, 24
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    steps = [step for step, _ in points]
    losses = [loss for _, loss in points]
    low, high = min(losses), max(losses)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return left + (width - left - right) * (step - first) / (last - first)

    def y(loss: float) -> float:
        return top + (height - top - bottom) * (high - loss) / (high - low)

    parts = [f'<path class="axis" d="M{left} {top} V{height - bottom} H{width - right}"/>']
    for index, line in enumerate(lines.values()):
        path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in line)
        parts.append(f'<polyline class="line l{index}" points="{path}"/>')
    for loss in (low, high):
        parts.append(f'<text class="end" x="{left - 4}" y="{y(loss) + 4:.1f}">{loss:.2f}</text>')
    for step, side in ((first, "start"), (last, "end")):
        parts.append(f'<text class="{side}" x="{x(step):.1f}" y="{height - 8}">{step}</text>')
    return _svg(width, height, name, parts)


def sparkline(values: Sequence[float], highest: float) -> str:
    """Return one small curve of steps from 0 to ``highest``, for the cell of a table that has the numbers too."""
    width, height = 90, 22
    step = width / len(values)
    y = [height - 2 - (height - 4) * value / (highest or 1) for value in values]
    path = " ".join(f"{step * (k + side):.1f},{y[k]:.1f}" for k in range(len(values)) for side in (0, 1))
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true">'
        f'<path class="axis" d="M0 {height - 1} H{width}"/><polyline class="line l0" points="{path}"/></svg>'
    )


def _svg(width: int, height: int, name: str, parts: Sequence[str]) -> str:
    label = escape(name, quote=True)
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _largest(mixtures: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the domains to draw each for itself: all, or those that ever weigh most; in their own order."""
    domains = list(mixtures[0])
    if len(domains) <= _BANDS:
        return domains
    chosen = sorted(domains, key=lambda each: -max(mixture[each] for mixture in mixtures))[: _BANDS - 1]
    return [each for each in domains if each in chosen]


def _apart(places: Sequence[float], gap: float, lowest: float, highest: float) -> list[float]:
    """Move falling places at least ``gap`` apart, staying near."""
    spread = list(places)
    spread[0] = min(spread[0], highest)
    for k in range(1, len(spread)):
        spread[k] = min(spread[k], spread[k - 1] - gap)
    spread[-1] = max(spread[-1], lowest)
    for k in range(len(spread) - 2, -1, -1):
        spread[k] = max(spread[k], spread[k + 1] + gap)
    return spread


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
