"""The roofline of the kernels: the speed they reach against the most this machine can do."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from tikmix_fast.report.benchmark_tables import main_rows
from tikmix_fast.report.pictures import WIDTH, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_roofline"]

_PLAIN = "plain weight gradient"
# Paul Tol's "bright" scheme; fillings tell ours from others without colour.
_KINDS = {
    "ours": ("tikmix_fast", "#4477AA", "full"),
    "other": ("fastest other with the same results", "#EE6677", "none"),
    "plain": ("torch, plain weight gradient", "#777777", "none"),
}
_MARKERS = "osD^vP*X"
_DASHES = ("-", "--", ":", "-.")


def draw_roofline(result: dict[str, Any]) -> Figure:
    """Draw the cases of an "ops" result under the measured roofs.

    Across: useful operations per byte that a kernel must at least move. Up: useful operations per second. The slanted
    roof is a copy's bandwidth; the flat ones are the fastest matrix products seen, one per dtype.
    """
    flops, bandwidth = result["rates"]["flops"], result["rates"]["bandwidth"]
    cases = [
        (marker, case, rows)
        for marker, case in zip(cycle(_MARKERS), result["cases"], strict=False)
        if (rows := _rows_by_kind(case))
    ]
    speeds = [row["flops_per_second"] for _, _, rows in cases for row in rows.values()]
    intensities = [*(peak / bandwidth for peak in flops.values()), *(case["intensity"] for _, case, _ in cases)]
    left, right = min(intensities) / 2, 1.5 * max(intensities)

    figure, axes = new_figure(WIDTH, 6.0)
    _draw_roofs(axes, flops, bandwidth, left, right)
    for marker, case, rows in cases:
        heights = [row["flops_per_second"] / 1e9 for row in rows.values()]
        axes.plot([case["intensity"]] * 2, [min(heights), max(heights)], color="#BBBBBB", linewidth=0.8, zorder=1)
        for kind, row in rows.items():
            axes.plot(case["intensity"], row["flops_per_second"] / 1e9, marker, zorder=3, **_style(kind))
    axes.set_xlim(left, right)
    axes.set_ylim(0.7 * min(*speeds, left * bandwidth) / 1e9, 1.4 * max(*speeds, *flops.values()) / 1e9)
    axes.set_xlabel("useful operations per byte that must be moved\n(a projection counts as the dense product)")
    axes.set_ylabel("useful operations, GF/s")
    figure.suptitle("Influence of one layer, under the measured roofs", fontsize=12, x=0.01, ha="left")
    _add_legend(figure, [(marker, case["case"]) for marker, case, _ in cases])
    return figure


def _draw_roofs(axes: Axes, flops: dict[str, float], bandwidth: float, left: float, right: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for dash, (dtype, peak) in zip(_DASHES, flops.items(), strict=False):
        ridge = peak / bandwidth
        roof = np.array([left * bandwidth, peak, peak]) / 1e9
        axes.plot([left, ridge, right], roof, dash, color="#222222", linewidth=1.4, zorder=2)
        axes.annotate(
            f"{dtype}: {peak / 1e9:.0f} GF/s",
            (ridge, peak / 1e9),
            xytext=(8, 3),
            textcoords="offset points",
            fontsize=9,
        )
    middle = (left * min(flops.values()) / bandwidth) ** 0.5
    axes.annotate(
        f"copy: {bandwidth / 1e9:.0f} GB/s", (middle, middle * bandwidth / 1e9), xytext=(8, -4),
        textcoords="offset points", va="top", fontsize=9.5,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#EEEEEE", linewidth=0.8, zorder=0)


def _add_legend(figure: Figure, cases: list[tuple[str, str]]) -> None:
    """Name the colours, then the shapes, below the picture."""
    from matplotlib.lines import Line2D

    shape = {**_style("plain"), "color": "#222222"}
    colours = [Line2D([], [], marker="o", **_style(kind), label=label) for kind, (label, _, _) in _KINDS.items()]
    shapes = [Line2D([], [], marker=marker, **shape, label=name) for marker, name in cases]
    figure.legend(handles=colours + shapes, loc="outside lower left", frameon=False, fontsize=9.5)


def _style(kind: str) -> dict[str, Any]:
    _, colour, filling = _KINDS[kind]
    return {
        "color": colour, "fillstyle": filling, "markersize": 7, "markeredgewidth": 1.6, "linestyle": "none",
    }  # fmt: skip


def _rows_by_kind(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows to draw: the fastest other with the same results as ours, the plain weight gradient, ours."""
    ours, other = main_rows(case)
    # A projection is cheaper than the weight gradient; a picture of both would compare different operations.
    plain = None if case.get("projection") else next((row for row in case["rows"] if row["method"] == _PLAIN), None)
    rows = {"other": other, "plain": plain, "ours": ours}
    return {kind: row for kind, row in rows.items() if row is not None}
