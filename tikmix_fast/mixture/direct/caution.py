"""Move a mixture only as far as the influence it rests on is known."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.special import stdtrit

from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.mixture.direct.problem import TOLERANCE, Problem

Array = NDArray[np.float64]

__all__ = ["cautious_step", "known_shares"]

# Below the tolerance of the final check, by what the linear program may miss its constraints.
_ALLOWED = 0.9 * TOLERANCE
_LP = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


def known_shares(matrix: InfluenceMatrix, scale: Array, prior: Array, confidence: float) -> Array:
    """Return for each domain [m] what share of its difference from the prior mixture is surely there, 0 to 1.

    With d_j the domain's scaled influence on all tasks minus that of the prior mixture, and e_j the standard errors of
    its own column, |d_j| is at least |d_j| - t |e_j| with at least this confidence (normal errors, however correlated
    over tasks: Szekely and Bakirov 2003; t is the two-sided quantile for the column's fewest degrees of freedom). The
    share is that over |d_j|, and 0 where it is negative or an error is unknown. The error of the prior mixture's own
    influence is left out: one badly known domain would otherwise hold all others back.
    """
    values, errors = matrix.values / scale[:, None], matrix.stderr / scale[:, None]
    measured = ~np.isnan(values).any(axis=0)
    weights = np.where(measured, prior if prior[measured].any() else 1.0, 0.0)
    reference = np.where(measured, values, 0.0) @ (weights / max(weights.sum(), 1e-300))
    signal = np.sqrt(((values - reference[:, None]) ** 2).sum(axis=0))
    noise = stdtrit(matrix.dof.min(axis=0), 0.5 + confidence / 2) * np.sqrt((errors**2).sum(axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.maximum(1.0 - noise / signal, 0.0)
    share = np.where(np.isnan(share), 0.0, share)
    return np.where((matrix.stderr == 0).all(axis=0), 1.0, share)


def cautious_step(problem: Problem, weights: Array, shares: Array) -> Array:
    """Return the mixture that moves from the prior towards ``weights``, no domain further than its share of the way.

    What domains may gain and what they may lose is then no longer equal; the larger of the two is scaled down. If that
    leaves a task worse than under the prior, the mixture is sought that moves most weight within the same limits and
    harms no task, and of several such the one with the least linear cost (two linear programs).

    No limit grows when an error does, so the weight moved, ``|w - prior|_1``, does not either: it is the optimum of a
    maximum over a set that shrinks. Bounds and the KL limit keep holding, because every weight stays between the
    prior's and the given one.
    """
    prior = problem.prior
    step = shares * (weights - prior)
    moved = _balanced(problem, step)
    if not problem.pareto or _harm(problem, moved) <= _ALLOWED:
        return moved
    largest = float(np.abs(step).max())
    signs, limits = np.sign(step), np.abs(step) / largest
    gain = problem.scaled * signs
    limited: dict[str, Any] = {
        "A_eq": signs[None],
        "b_eq": [0.0],
        "bounds": np.column_stack([np.zeros_like(limits), limits]),
        "method": "highs",
        "options": _LP,
    }
    harmless = np.full(len(gain), _ALLOWED / largest)
    most = linprog(-np.ones_like(limits), A_ub=-gain, b_ub=harmless, **limited)
    if most.x is None:
        return prior.copy()
    best = linprog(
        signs * problem.cost,
        A_ub=np.concatenate([-gain, -np.ones_like(limits)[None]]),
        b_ub=np.append(harmless, most.fun + 1e-9),
        **limited,
    )
    found = most.x if best.x is None else best.x
    moved = _balanced(problem, signs * np.clip(found, 0.0, limits) * largest)
    return moved if not problem.violations(moved) else prior.copy()


def _balanced(problem: Problem, step: Array) -> Array:
    """Return the prior plus the step, its gains or its losses scaled down to what the others allow."""
    gains, losses = step[step > 0].sum(), -step[step < 0].sum()
    total = min(gains, losses)
    if total <= 0:
        return problem.prior.copy()
    moved = problem.prior + np.where(step > 0, step * (total / gains), step * (total / losses))
    return np.asarray(np.maximum(moved, 0.0))


def _harm(problem: Problem, weights: Array) -> float:
    return float((problem.required - problem.scaled @ weights).max())
