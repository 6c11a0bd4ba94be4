"""The pictures of a demonstration. Colour-blind readers can tell their colours apart; phones can show their text.

A phone shows a picture about 2.5 inches wide, so pictures are 4.8 inches wide and no text is below 9 points.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tikmix_fast import files
from tikmix_fast.demo.results import DemoResult
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.report.findings import relative_influence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["WIDTH", "draw_influence", "draw_losses", "draw_mixture", "new_figure", "save_figure", "stack_bands"]

WIDTH = 4.8
"""Inches."""
# Paul Tol's "muted" scheme and its pale grey, which the last domain has.
_COLOURS = ("#332288", "#88CCEE", "#117733", "#DDCC77", "#CC6677", "#44AA99", "#AA4499", "#999933", "#882255")
_OURS, _THEIRS, _WORSE = "#0077BB", "#777777", "#BB3311"
_RESOLUTION = 200


def draw_influence(matrix: InfluenceMatrix, title: str = "") -> Figure:
    """Draw the matrix as a heat map, one row per domain, in shares of each task's largest magnitude.

    Blue helps, red harms. A cell shows the value and its standard error; it is grey and in brackets if the 95 %
    interval holds zero.
    """
    n, m = matrix.shape
    (values, errors), certain = relative_influence(matrix), matrix.significant()
    figure, axes = new_figure(max(WIDTH, 1.2 + 0.72 * n), 1.4 + 0.4 * m)
    axes.imshow(values.T, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for j, i in np.ndindex(m, n):
        text = "?"
        if not np.isnan(values[i, j]):
            error = f"\n±{errors[i, j]:.2f}" if np.isfinite(errors[i, j]) else ""
            text = (f"{values[i, j]:+.2f}" if certain[i, j] else f"({values[i, j]:+.2f})") + error
        colour = "white" if abs(values[i, j]) > 0.6 else ("black" if certain[i, j] else "#444444")
        axes.text(i, j, text, ha="center", va="center", fontsize=9, color=colour, linespacing=1.1)
    axes.xaxis.tick_top()
    axes.set_xticks(range(n), [task.replace(" ", "\n") for task in matrix.tasks], fontsize=9.5)
    axes.set_yticks(range(m), matrix.domains, fontsize=9.5)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(m + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    caption = "Shares of a task's largest; blue helps, red harms;\n± standard error; (…) the 95 % interval holds zero"
    axes.set_xlabel(caption, fontsize=9, color="#444444", loc="left")
    figure.suptitle(title or "Group Influence", fontsize=12, x=0.01, ha="left")
    return figure


def draw_mixture(result: DemoResult) -> Figure:
    """Draw the weight of every domain in every stage, stacked, with its name at the right edge."""
    domains = result.domains
    starts = [step for step, _ in result.tikmix.weights]
    edges = [*starts, result.settings.steps]
    weights = np.array([[mixture[name] for name in domains] for _, mixture in result.tikmix.weights])
    colours = [_colour(j, len(domains)) for j in range(len(domains))]
    figure, axes = new_figure(WIDTH, 3.8)
    stack_bands(axes, edges, weights, domains, colours, gap=0.055)
    middles = weights.cumsum(axis=1) - weights / 2
    for (stage, j), weight in np.ndenumerate(weights):
        start, end = list(pairwise(edges))[stage]
        if weight >= 0.06 and (end - start) / edges[-1] > 0.08:
            axes.text(
                (start + end) / 2, middles[stage, j], f"{weight:.0%}", ha="center", va="center", fontsize=9,
                color=_readable_on(colours[j]),
            )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Mixture by TiKMiX-D; the first stage is uniform", fontsize=12, x=0.01, ha="left")
    return figure


def stack_bands(
    axes: Axes, edges: Sequence[float], weights: NDArray[np.float64], names: Sequence[str], colours: Sequence[str],
    *, gap: float, size: float = 10, paper: str = "white", leader: str = "#999999",
) -> None:  # fmt: skip
    """Fill ``axes`` with weights [stage, band], stacked; stages hold between ``edges``, names stand at the right edge.

    Names have this size in points and at least ``gap`` of the height between them. ``paper`` is the colour between
    bands, ``leader`` that of the line from a band to its name.
    """
    tops = weights.cumsum(axis=1)
    for band, colour in enumerate(colours):
        axes.stairs(
            tops[:, band], edges, baseline=tops[:, band] - weights[:, band], fill=True, facecolor=colour,
            edgecolor=paper, linewidth=0.8, clip_on=False,
        )  # fmt: skip
    middles = tops[-1] - weights[-1] / 2
    for name, middle, place in zip(names, middles, _spread(middles, gap), strict=True):
        axes.annotate(
            name, xy=(edges[-1], middle), xytext=(1.04, place), textcoords=axes.get_yaxis_transform(), va="center",
            fontsize=size, annotation_clip=False, parse_math=False,
            arrowprops={
                "arrowstyle": "-", "color": leader, "linewidth": 0.8, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 0
            },
        )  # fmt: skip
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1))


def draw_losses(result: DemoResult) -> Figure:
    """Draw the loss of every task over training in both arms: steered tasks on the left, held-out ones on the right."""
    groups = [("steered for", result.steered), ("held out", result.held_out)]
    rows = max(len(tasks) for _, tasks in groups)
    figure, axes = new_figure(WIDTH, 1.1 + 1.25 * rows, rows=rows, columns=2)
    for column, (title, tasks) in zip(axes.T, groups, strict=True):
        for panel, task in zip(column, tasks, strict=False):
            _draw_loss(panel, result, task)
        for panel in column[len(tasks) :]:
            panel.set_visible(False)
        column[max(len(tasks) - 1, 0)].set_xlabel("step", fontsize=9)
        column[0].annotate(
            title, (0, 1), xytext=(0, 22), xycoords="axes fraction", textcoords="offset points", fontsize=10,
            fontweight="bold",
        )  # fmt: skip
    figure.suptitle("Loss on unseen text, nats per byte", fontsize=12, x=0.01, ha="left")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write the picture as PNG, atomically; returns the path."""
    from io import BytesIO

    content = BytesIO()
    figure.savefig(content, format="png", dpi=_RESOLUTION)
    return files.write_bytes(path, content.getvalue())


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """Return a figure of this size in inches with its axes: one, or an array [rows, columns] of them."""
    # Not pyplot: it keeps figures, and picks a backend that may need a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes if rows * columns > 1 else axes[0, 0]


def _draw_loss(panel: Axes, result: DemoResult, task: str) -> None:
    for arm, name, colour, style in (
        (result.uniform, "uniform", _THEIRS, "--"),
        (result.tikmix, "TiKMiX-D", _OURS, "-"),
    ):
        steps = [step for step, _ in arm.losses]
        panel.plot(steps, [losses[task] for _, losses in arm.losses], style, color=colour, linewidth=1.8, label=name)
    change = result.change((task,))
    panel.set_title(task, fontsize=10, loc="left")
    panel.set_title(
        f"{change:+.1%}", fontsize=10, loc="right", color=_OURS if change < 0 else _WORSE, fontweight="bold"
    )
    panel.axvline(result.settings.boundaries[0], color="#cccccc", linewidth=0.8, zorder=0)
    panel.locator_params(nbins=4)
    panel.tick_params(labelsize=9)
    panel.spines[["top", "right"]].set_visible(False)


def _colour(index: int, count: int) -> str:
    return "#BBBBBB" if index == count - 1 else _COLOURS[index % len(_COLOURS)]


def _readable_on(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _spread(places: NDArray[np.float64], gap: float) -> NDArray[np.float64]:
    """Move sorted places apart to at least ``gap``, staying near, within 0 to 1 if they fit."""
    spread = places.copy()
    for index in range(1, len(spread)):
        spread[index] = max(spread[index], spread[index - 1] + gap)
    spread[-1] = min(spread[-1], 1.0)
    for index in range(len(spread) - 2, -1, -1):
        spread[index] = min(spread[index], spread[index + 1] - gap)
    return spread
