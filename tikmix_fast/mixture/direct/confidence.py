"""Shorten the step of a mixture where its influence is uncertain."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linprog
from scipy.special import stdtrit

from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.mixture.direct.problem import TOLERANCE, Problem
from tikmix_fast.mixture.inputs import Array

__all__ = ["cautious_step", "known_shares"]

# Below the tolerance of the final check, to leave room for the linear program's own violations.
_ALLOWED = 0.9 * TOLERANCE
_LP = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


def known_shares(matrix: InfluenceMatrix, scale: Array, prior: Array, confidence: float) -> Array:
    """Return the certain share of each domain's difference from the prior mixture [m], between 0 and 1.

    Let d_j be the domain's scaled influence on all tasks minus that of the prior mixture, and e_j the standard errors
    of its own column. The true difference is at least |d_j| - t |e_j| with at least this confidence, for normal errors
    with any correlation over tasks (Szekely and Bakirov 2003); t is the two-sided quantile for the column's fewest
    degrees of freedom. The share is this bound over |d_j|; it is 0 where the bound is negative or an error is unknown.
    The bound ignores the error of the prior mixture's influence, or else one badly measured domain would hold back all
    others.
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
    """Return a mixture between the prior and ``weights`` in which no domain moves further than its share of the way.

    The shares leave gains and losses unequal, so the larger sum is scaled down to the smaller. If a task then fares
    worse than under the prior, two linear programs find the mixture that moves the most weight within the same limits
    without harm to any task, and among those the one with the least linear cost.

    A larger error never raises a limit, so it never raises the weight moved, ``|w - prior|_1``: a smaller set has no
    larger maximum. The bounds and the KL limit still hold, because every weight lies between the prior's and the given
    one.
    """
    prior = problem.prior
    step = shares * (weights - prior)
    moved = _balanced(problem, step)
    if not problem.pareto or _harm(problem, moved) <= _ALLOWED:
        return moved
    largest = float(np.abs(step).max())
    signs, limits = np.sign(step), np.abs(step) / largest
    gain = problem.scaled * signs
    program: dict[str, Any] = {
        "A_eq": signs[None],
        "b_eq": [0.0],
        "bounds": np.column_stack([np.zeros_like(limits), limits]),
        "method": "highs",
        "options": _LP,
    }
    harmless = np.full(len(gain), _ALLOWED / largest)
    most = linprog(-np.ones_like(limits), A_ub=-gain, b_ub=harmless, **program)
    if most.x is None:
        return prior.copy()
    best = linprog(
        signs * problem.cost,
        A_ub=np.concatenate([-gain, -np.ones_like(limits)[None]]),
        b_ub=np.append(harmless, most.fun + 1e-9),
        **program,
    )
    lengths = most.x if best.x is None else best.x
    moved = _balanced(problem, signs * np.clip(lengths, 0.0, limits) * largest)
    return moved if not problem.violations(moved) else prior.copy()


def _balanced(problem: Problem, step: Array) -> Array:
    """Return the prior plus the step, with the larger of its gains and losses scaled down to the smaller."""
    gains, losses = step[step > 0].sum(), -step[step < 0].sum()
    total = min(gains, losses)
    if total <= 0:
        return problem.prior.copy()
    moved = problem.prior + np.where(step > 0, step * (total / gains), step * (total / losses))
    return np.asarray(np.maximum(moved, 0.0))


def _harm(problem: Problem, weights: Array) -> float:
    """Return the largest loss of a task against the prior, scaled."""
    return float((problem.required - problem.scaled @ weights).max())
