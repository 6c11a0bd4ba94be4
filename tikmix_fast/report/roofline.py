"""The roofline of the kernels: what was reached against what this machine can do at most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tikmix_fast.report.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_roofline"]

_PLAIN = "plain weight gradient"
# Paul Tol's "bright" scheme; shapes and fillings tell the same apart without colour.
_KINDS = {
    "ours": ("tikmix_fast: influence + total", "#4477AA", "full"),
    "other": ("fastest other way to both", "#EE6677", "none"),
    "plain": ("torch, plain weight gradient", "#777777", "none"),
}
_MARKERS = "osD^vP*X"
_DASHES = ("-", "--", ":", "-.")


def draw_roofline(result: dict[str, Any]) -> Figure:
    """Draw the cases of an "ops" result under the measured roofs.

    Across: useful operations per byte that has to be moved at least. Up: useful operations per second. The slanted roof
    is a copy's bandwidth, the flat ones are the fastest matrix products seen, by dtype.
    """
    rates = result["rates"]
    figure, axes = new_figure(9.0, 5.4)
    points = [(index, case, _points(case)) for index, case in enumerate(result["cases"])]
    speeds = [row["flops_per_second"] for _, _, chosen in points for row in chosen.values()]
    intensities = [case["intensity"] for _, case, _ in points]
    ridge = min(rates["flops"].values()) / rates["bandwidth"]
    left, right = min(ridge, *intensities) / 4, 2.5 * max(ridge, *intensities)
    across = np.geomspace(left, right, 400)
    for dash, (dtype, peak) in zip(_DASHES, rates["flops"].items(), strict=False):
        axes.plot(across, np.minimum(peak, across * rates["bandwidth"]) / 1e9, dash, color="#222222", linewidth=1.4)
        axes.annotate(
            f"{dtype}: {peak / 1e9:.0f} GF/s", (right, peak / 1e9), xytext=(-4, 3), textcoords="offset points",
            ha="right", va="bottom", fontsize=9,
        )  # fmt: skip
    for index, case, chosen in points:
        marker = _MARKERS[index % len(_MARKERS)]
        heights = [row["flops_per_second"] / 1e9 for row in chosen.values()]
        axes.plot([case["intensity"]] * 2, [min(heights), max(heights)], color="#BBBBBB", linewidth=0.8, zorder=1)
        for kind, row in chosen.items():
            _, colour, filling = _KINDS[kind]
            axes.plot(
                case["intensity"], row["flops_per_second"] / 1e9, marker, color=colour, fillstyle=filling, markersize=8,
                markeredgewidth=1.6, linestyle="none", zorder=3,
            )  # fmt: skip
        axes.plot([], [], marker, color="#222222", fillstyle="none", linestyle="none", label=case["case"])
    for label, colour, filling in _KINDS.values():
        face = colour if filling == "full" else "white"
        axes.bar([1], [np.nan], color=face, edgecolor=colour, linewidth=1.6, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    lowest = min(*speeds, left * rates["bandwidth"])
    axes.set_ylim(0.7 * lowest / 1e9, 1.6 * max(*speeds, *rates["flops"].values()) / 1e9)
    axes.annotate(
        f"copy: {rates['bandwidth'] / 1e9:.0f} GB/s", (left * 1.1, 1.12 * left * rates["bandwidth"] / 1e9),
        xytext=(2, 10), textcoords="offset points", fontsize=9, va="bottom",
    )  # fmt: skip
    axes.set_xlabel("useful operations per byte that must be moved")
    axes.set_ylabel("useful operations per second, GF/s")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#EEEEEE", linewidth=0.8, zorder=0)
    axes.set_title("Group Influence of one layer under the measured roofs", fontsize=12, loc="left")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    return figure


def _points(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows to draw: ours, the fastest other that gives as much, and the plain weight gradient."""
    both = [row for row in case["rows"] if len(row["gives"]) == 2]
    others = [row for row in both if not row["ours"]]
    chosen = {
        "other": min(others, key=lambda row: row["seconds"], default=None),
        "plain": next((row for row in case["rows"] if row["method"] == _PLAIN), None),
        "ours": next((row for row in both if row["method"] == "tikmix_fast"), None),
    }
    return {kind: row for kind, row in chosen.items() if row is not None}
