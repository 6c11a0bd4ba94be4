"""How well a signal predicts the truth, and how well the truth predicts itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, rankdata

from tikmix_fast.mixture.direct.tikmix_d import tikmix_d

__all__ = ["ceiling", "choose_mixture", "halves", "judge"]

Array = NDArray[np.float64]
SCALES: dict[str, Callable[[Array], Array]] = {
    "std": lambda rows: np.std(rows, axis=1, keepdims=True),
    "max": lambda rows: np.abs(rows).max(axis=1, keepdims=True),
}


def judge(signal: Any, truth: Any, *, share: float = 1.0, held_out: Any = None) -> dict[str, float | None]:
    """Judge a signal [n, m] by the truth [n, m]: decreases of the loss of the steered tasks, the same rows in both.

    Parameters
    ----------
    signal, truth : array_like [n, m]
    share : float
        Share of the weight that moved in the truth. It turns the first-order gain of a mixture into nats.
    held_out : array_like [h, m], optional
        The truth of the held-out tasks.

    Returns
    -------
    dict
        ``spearman``, ``pearson``: within a task, mean over tasks. ``spearman_sum_std``, ``pearson_sum_std``, and the
        same with ``max``: of the sum over tasks, with rows over their standard deviation or their largest magnitude.
        ``best_domain_regret_std``, ``_max``: that sum of the truth at its best domain, minus at the domain that the
        signal calls best, over the range of the sum: 0 is best, 1 worst.
        ``mixture_regret``: of TiKMiX-D's mixture. The value of a mixture is the sum over tasks of the truth, rows over
        their largest magnitude, to first order: 0 is the value of the mixture chosen by the truth, 1 that of the
        uniform mixture. A mixture that bets more on fewer domains than the truth's may be below 0.
        ``steered_gain``, ``held_out_gain``: the mean decrease of the loss that the mixture brings, in nats, to first
        order. None marks a number that is not defined, such as the correlation of a constant.
    """
    signal, truth = np.asarray(signal, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if signal.shape != truth.shape or signal.ndim != 2:
        raise ValueError(f"signal and truth must both have shape [n, m]; got {signal.shape} and {truth.shape}")
    result = {name: _mean_by_task(correlate, signal, truth) for name, correlate in _CORRELATIONS.items()}
    for name in SCALES:
        guess, value = _sum(signal, name), _sum(truth, name)
        for kind, correlate in _CORRELATIONS.items():
            result[f"{kind}_sum_{name}"] = correlate(guess, value)
        result[f"best_domain_regret_{name}"] = _ratio(value.max() - value[guess.argmax()], np.ptp(value))
    uniform = np.full(truth.shape[1], 1 / truth.shape[1])
    mixture, best = choose_mixture(signal), choose_mixture(truth)
    values = _sum(truth, "max")
    result["mixture_regret"] = _ratio(float(values @ (best - mixture)), float(values @ (best - uniform)))
    result["steered_gain"] = float(np.mean(truth @ (mixture - uniform)) / share)
    if held_out is not None:
        result["held_out_gain"] = float(np.mean(np.asarray(held_out) @ (mixture - uniform)) / share)
    return result


def choose_mixture(matrix: Array) -> Array:
    """Return TiKMiX-D's mixture from the uniform one: diversity 0.3, floor 0.05, rows over their largest magnitude."""
    m = matrix.shape[1]
    floor = min(0.05, 0.5 / m)
    chosen = tikmix_d(matrix, np.full(m, 1 / m), diversity=0.3, norm="maxabs", pareto=False, floor=floor)
    return np.asarray(chosen.weights, dtype=np.float64)


def ceiling(draws: Array) -> dict[str, float | None]:
    """Return the agreement of the mean of ``draws`` [r, n, m] with the mean of as many others.

    It is the mean correlation of two disjoint halves of r // 2 draws, raised to r draws by Spearman and Brown. A signal
    without any noise of its own can reach the square root of it.
    """
    half = len(draws) // 2
    pairs = [(draws[list(a)].mean(0), draws[list(b)].mean(0)) for a, b in _disjoint(len(draws), half)]
    result: dict[str, float | None] = {}
    for kind, correlate in _CORRELATIONS.items():
        result[kind] = _corrected([_mean_by_task(correlate, *pair) for pair in pairs], len(draws) / half)
        for name in SCALES:
            sums = [correlate(_sum(a, name), _sum(b, name)) for a, b in pairs]
            result[f"{kind}_sum_{name}"] = _corrected(sums, len(draws) / half)
    return result


def halves(count: int, size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield every choice of ``size`` draws, and the other draws."""
    for chosen in combinations(range(count), size):
        yield list(chosen), [each for each in range(count) if each not in chosen]


def _disjoint(count: int, size: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for first in combinations(range(count), size):
        for second in combinations(range(count), size):
            if first < second and not set(first) & set(second):
                yield first, second


def _corrected(correlations: list[float | None], factor: float) -> float | None:
    known = [each for each in correlations if each is not None]
    if not known:
        return None
    r = float(np.mean(known))
    return factor * r / (1 + (factor - 1) * r) if r > 0 else r


def _pearson(left: Array, right: Array) -> float | None:
    if not (np.ptp(left) and np.ptp(right)):
        return None
    return float(pearsonr(left, right).statistic)


def _spearman(left: Array, right: Array) -> float | None:
    return _pearson(rankdata(left), rankdata(right))


_CORRELATIONS: dict[str, Callable[[Array, Array], float | None]] = {"spearman": _spearman, "pearson": _pearson}


def _mean_by_task(correlate: Callable[[Array, Array], float | None], left: Array, right: Array) -> float | None:
    each = [correlate(*rows) for rows in zip(left, right, strict=True)]
    known = [value for value in each if value is not None]
    return float(np.mean(known)) if known else None


def _sum(rows: Array, scale: str) -> Array:
    size = SCALES[scale](rows)
    return np.asarray((rows / np.where(size > 0, size, 1)).sum(0))


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None
