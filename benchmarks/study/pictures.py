"""The pictures of the study's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.study import comparisons
from benchmarks.study.comparisons import OURS, REFERENCE, Array, Results
from benchmarks.study.problem import EARLY, NOISE, SHORT
from tikmix_fast.report.plots import new_figure

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
    figure, axes = new_figure(14, 0.6 + 0.36 * len(order), columns=4)
    places = np.arange(len(order))
    panels = [
        (
            "steered tasks, change from uniform",
            [100 * comparisons.changes(results, arm, REFERENCE, steered) for arm in order],
        ),
        (
            "held-out tasks, change from uniform",
            [100 * comparisons.changes(results, arm, REFERENCE, held_out) for arm in order],
        ),
        ("weight of noise at the end, 1 = uniform", [comparisons.last_weights(results, arm, NOISE) for arm in order]),
    ]
    for panel, (title, values) in zip(axes[0, :3], panels, strict=True):
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
        if "weight" not in title:
            panel.xaxis.set_major_formatter("{x:+g}%")
    cost = axes[0, 3]
    cost.barh(
        places, [comparisons.mixing_flops(results, arm) for arm in order], height=0.6,
        color=[_COLOURS[4] if arm.startswith("tikmix") else _COLOURS[0] for arm in order],
    )  # fmt: skip
    cost.set_xscale("log")
    cost.xaxis.set_minor_formatter("")
    cost.set_title("FLOPs spent on mixing", fontsize=10, loc="left")
    for index, panel in enumerate(axes[0]):
        panel.set_ylim(-0.6, len(order) - 0.4)
        panel.set_yticks(places, order if index == 0 else [""] * len(order))
        panel.tick_params(labelsize=9, left=False)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", color="#eeeeee", zorder=0)
        panel.set_axisbelow(True)
    return figure


def draw_weights(results: Results, arms: Sequence[str]) -> Any:
    """Draw the mean mixture of some arms over training, stacked."""
    figure, axes = new_figure(3.4 * len(arms) + 1.6, 3.4, columns=len(arms))
    panels = axes[0] if len(arms) > 1 else [axes]
    for panel, arm in zip(panels, arms, strict=True):
        runs = list(results[arm].values())
        domains, steps = list(runs[0]["drawn"]), runs[0]["settings"]["main"]["steps"]
        grid = np.arange(steps)
        mean = np.mean([mixture_at(run["mixtures"], domains, grid) for run in runs], axis=0)
        colours = [*_COLOURS[: len(domains) - 1], _GREY]
        panel.stackplot(grid, mean, colors=colours, labels=domains, linewidth=0.4, edgecolor="white")
        panel.set(xlim=(0, steps), ylim=(0, 1), xlabel="step")
        panel.set_title(arm, fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("weight in the mixture")
    handles, labels = panels[-1].get_legend_handles_labels()
    panels[-1].legend(
        handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
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
    figure, axes = new_figure(5.6, 3.4)
    for name, colour in ((SHORT, _COLOURS[0]), ("python", _COLOURS[2]), (EARLY, _COLOURS[4]), (NOISE, "#777777")):
        j = domains.index(name)
        axes.errorbar(steps, mean[:, j], spread[:, j], color=colour, marker="o", markersize=4, capsize=3, label=name)
    axes.axhline(0, color="#999999", linewidth=0.8, zorder=0)
    axes.set(xlabel="step", ylabel="influence, share of each task's largest")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
