"""The pictures of the study's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.study import comparisons
from benchmarks.study.comparisons import OURS, REFERENCE, Array, Results
from benchmarks.study.problem import EARLY, NOISE, SHORT
from tikmix_fast.report.pictures import WIDTH, new_figure

__all__ = ["draw_changes", "draw_influence", "draw_weights", "mixture_at"]

_COLOURS = (
    "#332288",
    "#88CCEE",
    "#117733",
    "#DDCC77",
    "#CC6677",
    "#44AA99",
    "#AA4499",
    "#999933",
    "#882255",
    "#661100",
)
_GREY = "#BBBBBB"


def draw_changes(results: Results) -> Any:
    """Draw paired changes with intervals, the weight of the noise domain, and the cost of every arm."""
    steered, held_out = comparisons.steered_and_held_out(results)
    order = comparisons.in_order(results)[::-1]
    figure, axes = new_figure(WIDTH, 1.2 + 0.4 * len(order), rows=2, columns=2)
    places = np.arange(len(order))
    panels = [
        (
            "steered tasks, change",
            [100 * comparisons.changes(results, arm, REFERENCE, steered) for arm in order],
        ),
        (
            "held-out tasks, change",
            [100 * comparisons.changes(results, arm, REFERENCE, held_out) for arm in order],
        ),
        ("noise weight / uniform", [comparisons.last_weights(results, arm, NOISE) for arm in order]),
    ]
    for panel, (title, values) in zip(axes.flat, panels, strict=False):
        for place, arm, each in zip(places, order, values, strict=True):
            if not len(each):
                continue
            mean, half = comparisons.interval(each)
            colour = _COLOURS[4] if arm.startswith("tikmix") else _COLOURS[0]
            panel.plot(each, np.full(len(each), place), ".", color=_GREY, markersize=5, zorder=1)
            panel.errorbar(mean, place, xerr=half, fmt="o", color=colour, markersize=5, capsize=3, zorder=2)
        panel.axvline(1 if "weight" in title else 0, color="#999999", linewidth=0.8, zorder=0)
        if "weight" in title:
            panel.set_xlim(-0.1, 1.1 * max(2.0, *(each.max() for each in values)))  # some intervals reach further
        panel.set_title(title, fontsize=10, loc="left")
        panel.xaxis.get_major_locator().set_params(nbins=4)
        if "weight" not in title:
            panel.xaxis.set_major_formatter("{x:+g}%")
    cost = axes[1, 1]
    cost.barh(
        places, [comparisons.mixing_flops(results, arm) for arm in order], height=0.6,
        color=[_COLOURS[4] if arm.startswith("tikmix") else _COLOURS[0] for arm in order],
    )  # fmt: skip
    cost.set_xscale("log")
    cost.xaxis.set_minor_formatter("")
    cost.set_title("FLOPs spent on mixing", fontsize=10, loc="left")
    for index, panel in enumerate(axes.flat):
        panel.set_ylim(-0.6, len(order) - 0.4)
        panel.set_yticks(places, order if index % 2 == 0 else [""] * len(order))
        panel.tick_params(labelsize=9, left=False)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", color="#eeeeee", zorder=0)
        panel.set_axisbelow(True)
    return figure


def draw_weights(results: Results, arms: Sequence[str]) -> Any:
    """Draw the mean mixture of some arms over training, stacked."""
    rows = -(-len(arms) // 2)
    figure, axes = new_figure(WIDTH, 1.2 + 1.8 * rows, rows=rows, columns=2)
    for panel in axes.flat[len(arms) :]:
        panel.set_visible(False)
    for panel, arm in zip(axes.flat, arms, strict=False):
        runs = list(results[arm].values())
        domains, steps = list(runs[0]["drawn"]), runs[0]["settings"]["main"]["steps"]
        grid = np.arange(steps)
        mean = np.mean([mixture_at(run["mixtures"], domains, grid) for run in runs], axis=0)
        colours = [*_COLOURS[: len(domains) - 1], _GREY]
        panel.stackplot(grid, mean, colors=colours, labels=domains, linewidth=0.4, edgecolor="white")
        panel.set(xlim=(0, steps), ylim=(0, 1), xticks=[0, steps // 2, steps])
        panel.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
        panel.set_title(arm, fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("step")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    return figure


def mixture_at(mixtures: Sequence[Mapping[str, Any]], domains: Sequence[str], steps: NDArray[np.int64]) -> Array:
    """Return the weights [m, len(steps)] in force at ``steps``."""
    starts = [each["step"] for each in mixtures]
    weights = np.array([[each["domains"][name] for name in domains] for each in mixtures])
    return np.asarray(weights[np.searchsorted(starts, steps, side="right") - 1].T)


def draw_influence(results: Results) -> Any:
    """Draw the influence of the study's own domains over training: mean over tasks, scaled per task."""
    runs = list(results[OURS].values())
    domains = list(runs[0]["drawn"])
    steps = [each["step"] for each in runs[0]["log"]]
    shares = []
    for run in runs:
        values = np.array([each["influence"] for each in run["log"]], dtype=np.float64)  # [stage, n, m]
        shares.append((values / np.nanmax(np.abs(values), axis=2, keepdims=True)).mean(1))
    mean, spread = np.mean(shares, axis=0), np.std(shares, axis=0)
    figure, axes = new_figure(WIDTH, 3.6)
    for name, colour in ((SHORT, _COLOURS[0]), ("python", _COLOURS[2]), (EARLY, _COLOURS[4]), (NOISE, "#777777")):
        j = domains.index(name)
        axes.errorbar(steps, mean[:, j], spread[:, j], color=colour, marker="o", markersize=4, capsize=3, label=name)
    axes.axhline(0, color="#999999", linewidth=0.8, zorder=0)
    axes.set(xlabel="step", ylabel="influence, share of each task's largest")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
