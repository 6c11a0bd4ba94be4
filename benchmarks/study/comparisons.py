"""What the tables and pictures of the study compare: paired changes, intervals, weights and costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = [
    "OURS",
    "REFERENCE",
    "Array",
    "Results",
    "changes",
    "in_order",
    "interval",
    "last_weights",
    "mixing_flops",
    "plateau",
    "steered_and_held_out",
]

Array = NDArray[np.float64]
Results = dict[str, dict[int, dict[str, Any]]]
"""Results by arm and seed."""

REFERENCE, OURS = "uniform", "tikmix-d"


def steered_and_held_out(results: Results) -> tuple[list[str], list[str]]:
    """Return the names of the steered tasks and of the others."""
    content = next(iter(next(iter(results.values())).values()))
    return content["steered"], [name for name in content["final"] if name not in content["steered"]]


def changes(results: Results, arm: str, base: str, tasks: Sequence[str]) -> Array:
    """Return the relative change of the mean loss of ``tasks`` from ``base`` to ``arm``, for each common seed."""
    return np.array(
        [
            np.mean([results[arm][seed]["final"][task] for task in tasks])
            / np.mean([results[base][seed]["final"][task] for task in tasks])
            - 1
            for seed in sorted(set(results[arm]) & set(results.get(base, {})))
        ]
    )


def interval(values: Array) -> tuple[float, float]:
    """Return the mean and half the width of its 95% t interval; the width is NaN below two values."""
    if not len(values):
        return np.nan, np.nan
    if len(values) < 2:
        return float(values.mean()), np.nan
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def last_weights(results: Results, arm: str, domain: str) -> Array:
    """Return the last weight of ``domain`` over its uniform weight, for each seed."""
    ends = [each["mixtures"][-1]["domains"] for each in results[arm].values()]
    return np.array([weights[domain] * len(weights) for weights in ends])


def mixing_flops(results: Results, arm: str) -> float:
    """Return the mean number of operations for the choice of the mixture."""
    return float(np.mean([each["flops"]["mixing"] for each in results[arm].values()]))


def plateau(results: Results) -> str | None:
    """Return the cheapest RegMix whose steered loss is not reliably above the best one's."""
    counts = sorted((name for name in results if name.startswith("regmix")), key=lambda name: int(name.split()[1]))
    if not counts:
        return None
    steered, _ = steered_and_held_out(results)

    def mean_loss(name: str) -> float:
        return float(np.mean([each["final"][task] for each in results[name].values() for task in steered]))

    best = min(counts, key=mean_loss)
    for name in counts:
        mean, half = interval(changes(results, name, best, steered))
        if name == best or (mean - half <= 0):
            return name
    return best


def in_order(results: Results) -> list[str]:
    """Return the arms by their paired change of the steered loss, the lowest first."""
    steered, _ = steered_and_held_out(results)
    change = {arm: changes(results, arm, REFERENCE, steered) for arm in results}
    return sorted(change, key=lambda arm: float(change[arm].mean()) if len(change[arm]) else np.inf)
