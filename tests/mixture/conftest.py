"""The mixture problem written again from the paper, and a proof of optimality that shares nothing with the solvers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.special import xlogy


def _scaled(influence):
    """Equation 9 with the guard of method.md 2.3: a row without a real maximum is divided by its magnitude."""
    rows = []
    for row in influence:
        top, size = max(row), max(abs(row))
        rows.append(row / top if top > 1e-3 * size else row / size if size else row)
    return np.array(rows)


def _objective(scaled, weights, uniformity=1.0, influence=1.0, diversity=1.0):
    gain = scaled @ weights
    spread = np.sqrt(np.mean((gain - gain.mean()) ** 2))
    return uniformity * spread - influence * gain.sum() + diversity * xlogy(weights, weights).sum()


def _shortfall(scaled, weights, prior, lower, upper, uniformity=1.0, influence=1.0, diversity=1.0, pareto=True):
    """Bound how far the weights are above the optimum: the best that any feasible mixture gains along a gradient.

    The objective is convex, so it lies above its tangent at any point (Frank and Wolfe's gap, one linear program). The
    tangent is taken beside the weights, where none is zero. What the linear program may gain by its own tolerance, at
    its own prices, is taken off.
    """
    n, m = scaled.shape
    factors = (uniformity, influence, diversity)
    beside = (1 - 1e-9) * weights + 1e-9 / m
    gain = scaled @ beside
    centred = gain - gain.mean()
    slope = diversity * (1.0 + np.log(beside)) - influence * scaled.sum(axis=0)
    if uniformity and n > 1:
        slope = slope + uniformity * (centred @ scaled) / np.sqrt(n * (centred @ centred))
    best = linprog(
        slope,
        A_ub=-scaled if pareto else None,
        b_ub=-(scaled @ prior) + 1e-10 if pareto else None,
        A_eq=np.ones((1, m)),
        b_eq=[1.0],
        bounds=np.column_stack([np.full(m, lower), np.full(m, upper)]),
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    assert best.success, best.message
    prices = np.abs(best.ineqlin.marginals).sum() if pareto else 0.0
    above = _objective(scaled, weights, *factors) - _objective(scaled, beside, *factors)
    return above + slope @ beside - best.fun - 1e-10 * prices


@pytest.fixture(scope="session")
def paper():
    return SimpleNamespace(scaled=_scaled, objective=_objective, shortfall=_shortfall)
