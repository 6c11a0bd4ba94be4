"""The roofline of the kernels: what was reached against what this machine can do at most."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from tikmix_fast.report.benchmark_tables import main_rows
from tikmix_fast.report.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_roofline"]

_PLAIN = "plain weight gradient"
# Paul Tol's "bright" scheme; shapes and fillings tell the same apart without colour.
_KINDS = {
    "ours": ("tikmix_fast", "#4477AA", "full"),
    "other": ("fastest other with the same results", "#EE6677", "none"),
    "plain": ("torch, plain weight gradient", "#777777", "none"),
}
_MARKERS = "osD^vP*X"
_DASHES = ("-", "--", ":", "-.")


def draw_roofline(result: dict[str, Any]) -> Figure:
    """Draw the cases of an "ops" result under the measured roofs.

    Across: useful operations per byte that has to be moved at least. Up: useful operations per second. The slanted roof
    is a copy's bandwidth, the flat ones are the fastest matrix products seen, by dtype.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    flops, bandwidth = result["rates"]["flops"], result["rates"]["bandwidth"]
    cases = [
        (marker, case, chosen)
        for marker, case in zip(cycle(_MARKERS), result["cases"], strict=False)
        if (chosen := _points(case))
    ]
    speeds = [row["flops_per_second"] for _, _, chosen in cases for row in chosen.values()]
    ridges = [peak / bandwidth for peak in flops.values()]
    left = min(*ridges, *(case["intensity"] for _, case, _ in cases)) / 2
    right = 2 * max(*ridges, *(case["intensity"] for _, case, _ in cases))

    figure, axes = new_figure(8.6, 5.6)
    for dash, (dtype, peak) in zip(_DASHES, flops.items(), strict=False):
        axes.plot(
            [left, peak / bandwidth, right], np.array([left * bandwidth, peak, peak]) / 1e9, dash, color="#222222",
            linewidth=1.4, zorder=2,
        )  # fmt: skip
        axes.annotate(
            f"{dtype}: {peak / 1e9:.0f} GF/s", (right, peak / 1e9), xytext=(-4, 3), textcoords="offset points",
            ha="right", va="bottom", fontsize=9,
        )  # fmt: skip
    middle = (left * min(ridges)) ** 0.5
    axes.annotate(
        f"copy: {bandwidth / 1e9:.0f} GB/s", (middle, middle * bandwidth / 1e9), xytext=(8, -4),
        textcoords="offset points", ha="left", va="top", fontsize=9,
    )  # fmt: skip
    for marker, case, chosen in cases:
        heights = [row["flops_per_second"] / 1e9 for row in chosen.values()]
        axes.plot([case["intensity"]] * 2, [min(heights), max(heights)], color="#BBBBBB", linewidth=0.8, zorder=1)
        for kind, row in chosen.items():
            axes.plot(case["intensity"], row["flops_per_second"] / 1e9, marker, zorder=3, **_style(kind))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(0.7 * min(*speeds, left * bandwidth) / 1e9, 1.4 * max(*speeds, *flops.values()) / 1e9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.set_xlabel("useful operations (projections count as dense) per byte that must be moved")
    axes.set_ylabel("useful operations per second, GF/s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#EEEEEE", linewidth=0.8, zorder=0)
    axes.set_title("Group Influence of one layer under the measured roofs", fontsize=12, loc="left")

    shapes = [
        Line2D([], [], marker=marker, **{**_style("plain"), "color": "#222222"}, label=case["case"])
        for marker, case, _ in cases
    ]
    colours = [Line2D([], [], marker="o", **_style(kind), label=label) for kind, (label, _, _) in _KINDS.items()]
    figure.legend(handles=shapes, loc="outside lower left", frameon=False, fontsize=9)
    figure.legend(handles=colours, loc="outside lower right", frameon=False, fontsize=9)
    return figure


def _style(kind: str) -> dict[str, Any]:
    _, colour, filling = _KINDS[kind]
    return {
        "color": colour, "fillstyle": filling, "markersize": 7, "markeredgewidth": 1.6, "linestyle": "none",
    }  # fmt: skip


def _points(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows to draw: the fastest other that gives as much as ours, the plain weight gradient, ours."""
    ours, other = main_rows(case)
    # A projection is cheaper than the weight gradient: to draw both would compare different operations.
    plain = None if case.get("projection") else next((row for row in case["rows"] if row["method"] == _PLAIN), None)
    chosen = {"other": other, "plain": plain, "ours": ours}
    return {kind: row for kind, row in chosen.items() if row is not None}
