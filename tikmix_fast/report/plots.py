"""The pictures of a demonstration, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tikmix_fast import files
from tikmix_fast.demo.results import DemoResult
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_influence", "draw_losses", "draw_mixture", "new_figure", "save_figure"]

# Paul Tol's "muted" scheme and its pale grey, which is kept for the last domain.
_COLOURS = ("#332288", "#88CCEE", "#117733", "#DDCC77", "#CC6677", "#44AA99", "#AA4499", "#999933", "#882255")
_OURS, _THEIRS, _WORSE = "#0077BB", "#777777", "#BB3311"
_RESOLUTION = 160


def draw_influence(matrix: InfluenceMatrix, title: str = "") -> Figure:
    """Draw the matrix as a heat map: each row divided by its largest magnitude, so that tasks can be compared.

    Blue helps, red harms. A cell shows the value and its standard error; it is grey and in brackets where the 95 %
    interval holds zero.
    """
    n, m = matrix.shape
    scale = np.nanmax(np.abs(matrix.values), axis=1, keepdims=True)
    scale[~(scale > 0)] = 1.0
    values, errors, certain = matrix.values / scale, matrix.stderr / scale, matrix.significant()
    figure, axes = new_figure(1.6 + 0.95 * m, 1.5 + 0.62 * n)
    image = axes.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for i in range(n):
        for j in range(m):
            if np.isnan(values[i, j]):
                text = "?"
            else:
                number = f"{values[i, j]:+.2f}"
                error = f"\n±{errors[i, j]:.2f}" if np.isfinite(errors[i, j]) else ""
                text = number + error if certain[i, j] else f"({number}){error}"
            dark = abs(values[i, j]) > 0.6
            colour = "white" if dark else ("black" if certain[i, j] else "#555555")
            axes.text(j, i, text, ha="center", va="center", fontsize=9, color=colour, linespacing=1.1)
    axes.set_xticks(range(m), matrix.domains, rotation=0 if m <= 10 else 45, fontsize=10)
    axes.set_yticks(range(n), matrix.tasks, fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(m + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(n + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    caption = "rows divided by their largest magnitude; ± standard error; (…) the 95 % interval holds zero"
    axes.set_xlabel(caption, fontsize=8, color="#555555", loc="right")
    axes.set_title(title or "Group Influence", fontsize=12, loc="left")
    bar = figure.colorbar(image, ax=axes, pad=0.015, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["harms", "0", "helps"])
    bar.outline.set_visible(False)
    return figure


def draw_mixture(result: DemoResult) -> Figure:
    """Draw the weight of every domain in every stage, stacked, with its name at the right edge."""
    domains = result.domains
    starts = [step for step, _ in result.tikmix.weights]
    edges = [*starts, result.settings.steps]
    weights = np.array([[mixture[name] for name in domains] for _, mixture in result.tikmix.weights])
    tops = weights.cumsum(axis=1)
    figure, axes = new_figure(7.5, 4.2)
    for j, name in enumerate(domains):
        axes.bar(
            starts, weights[:, j], width=np.diff(edges), bottom=tops[:, j] - weights[:, j], align="edge",
            color=_colour(j, len(domains)), edgecolor="white", linewidth=0.8, label=name,
        )  # fmt: skip
        for stage, (start, end) in enumerate(pairwise(edges)):
            if weights[stage, j] >= 0.06 and (end - start) / edges[-1] > 0.08:
                axes.text(
                    (start + end) / 2, tops[stage, j] - weights[stage, j] / 2, f"{weights[stage, j]:.0%}", ha="center",
                    va="center", fontsize=8, color=_readable_on(_colour(j, len(domains))),
                )  # fmt: skip
    middles = tops[-1] - weights[-1] / 2
    for name, middle, place in zip(domains, middles, _spread(middles, 0.055), strict=True):
        axes.annotate(
            name, xy=(edges[-1], middle), xytext=(1.03, place), textcoords=axes.get_yaxis_transform(), va="center",
            fontsize=10, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#999999", "lw": 0.8, "relpos": (0, 0.5), "shrinkA": 0},
        )  # fmt: skip
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(0, 1)
    axes.set_xlabel("step")
    axes.set_ylabel("weight in the mixture")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Mixture by TiKMiX-D; the first stage is uniform", fontsize=12, loc="left")
    return figure


def draw_losses(result: DemoResult) -> Figure:
    """Draw the loss of every task over training in both arms, steered tasks first."""
    groups = [("steered for", result.steered), ("held out", result.held_out)]
    columns = max(len(tasks) for _, tasks in groups)
    figure, axes = new_figure(2.3 * columns, 4.8, rows=2, columns=columns)
    for row, (title, tasks) in zip(axes, groups, strict=True):
        for index, panel in enumerate(row):
            if index >= len(tasks):
                panel.set_visible(False)
                continue
            _draw_loss(panel, result, tasks[index])
        row[0].set_ylabel(f"{title}\nnats per byte", fontsize=10)
    for panel in axes[-1]:
        panel.set_xlabel("step", fontsize=9)
    figure.suptitle("Loss on text that was neither trained on nor measured", fontsize=12, x=0.01, ha="left")
    axes[0, 0].legend(frameon=False, fontsize=9, loc="upper right")
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
    panel.tick_params(labelsize=8)
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
