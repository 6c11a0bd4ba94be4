"""Join the bounds on the weights, and report those that exclude every mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import SupportsIndex

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from tikmix_fast.mixture.direct import interior_point as interior
from tikmix_fast.mixture.direct.problem import TOLERANCE, Limit, Problem, kl_divergence
from tikmix_fast.mixture.inputs import Array, Names, label

__all__ = ["check_feasible", "join_bounds", "require_within"]

_ROUNDING = 1e-12
_LP_ERROR = 1e-8  # the checks of a solver's answer catch smaller violations


def join_bounds(
    floors: Sequence[Limit], caps: Sequence[Limit], prior: Array, measured: NDArray[np.bool_], domains: Names
) -> tuple[Array, Array]:
    """Return the tightest lower and upper bounds [m]. They fix an unmeasured domain at its prior weight.

    Raises
    ------
    ValueError
        If the bounds of one domain, or of all together, allow no mixture; the message names the bounds.
    """
    lower = np.max([limit.bound for limit in floors], axis=0)
    upper = np.min([limit.bound for limit in caps], axis=0)

    for j in np.flatnonzero(lower > upper + _ROUNDING):
        raise ValueError(
            f"domain {label(domains, j)}: {_source(floors, lower, j)} {lower[j]:g} is above"
            f" {_source(caps, upper, j)} {upper[j]:g}; lower the first or raise the second"
        )
    lower = np.minimum(lower, upper)
    for limits, bound, word, beyond in (
        (floors, lower, "below", prior < lower - _ROUNDING),
        (caps, upper, "above", prior > upper + _ROUNDING),
    ):
        for j in np.flatnonzero(beyond & ~measured):
            raise ValueError(
                f"domain {label(domains, j)} was never measured, so it keeps its prior weight {prior[j]:g}, which is"
                f" {word} its {_source(limits, bound, j)} {bound[j]:g}; measure it, or change the bound or the prior"
            )
    lower = np.where(measured, lower, prior)
    upper = np.where(measured, upper, prior)
    fixed = "" if measured.all() else ", with the unmeasured domains at their prior weights,"
    if lower.sum() > 1.0 + _ROUNDING:
        names = _sources(floors, lower)
        raise ValueError(f"{names}{fixed} must sum to at most 1 over the domains; got {lower.sum():g}; lower {names}")
    if upper.sum() < 1.0 - _ROUNDING:
        names = _sources(caps, upper)
        raise ValueError(f"{names}{fixed} must sum to at least 1 over the domains; got {upper.sum():g}; raise {names}")
    return lower, upper


def check_feasible(problem: Problem, bound_names: str) -> None:
    """Raise if Pareto or the KL limit cannot hold within the bounds. Without bounds, the prior satisfies both.

    Raises
    ------
    ValueError
        Naming the tasks that must lose, or the smallest KL that the bounds allow.
    """
    if not problem.violations(problem.nearest_to_prior()):
        return
    if problem.pareto:
        short = _pareto_shortfall(problem)
        if short.max() > _LP_ERROR:
            failing = ", ".join(label(problem.tasks, i) for i in np.flatnonzero(short > _LP_ERROR))
            raise ValueError(
                f"pareto=True cannot hold within {bound_names}: task(s) {failing} would fall below the prior by"
                f" {short.max():.3g} (normalised) at best; loosen the bounds, use pareto=False, or change the prior"
            )
    if problem.max_kl is not None:
        log_prior = np.log(np.where(problem.prior > 0, problem.prior, 1.0))
        closest = interior.solve(replace(problem, cost=-log_prior, uniformity=0.0, diversity=1.0, max_kl=None))
        divergence = kl_divergence(closest.weights, problem.prior)
        if divergence - closest.gap > problem.max_kl + TOLERANCE:
            also = " and pareto=True" if problem.pareto else ""
            raise ValueError(
                f"max_kl={problem.max_kl:g} cannot hold within {bound_names}{also}: they alone force a KL divergence of"
                f" {divergence:.6g} from the prior; raise max_kl, loosen the bounds, or change the prior"
            )


def require_within(weights: Array, lower: Array, upper: Array, domains: Names, message: str) -> None:
    """Raise ValueError unless the weights [m] keep the bounds; ``message`` says why, the first violation follows it."""
    outside = np.flatnonzero((weights < lower - TOLERANCE) | (weights > upper + TOLERANCE))
    if outside.size:
        j = int(outside[0])
        raise ValueError(
            f"{message}; got {weights[j]:g} for domain {label(domains, j)}, outside [{lower[j]:g}, {upper[j]:g}]"
        )


def _pareto_shortfall(problem: Problem) -> Array:
    """Return the least sum of shortfalls below the prior, task by task [n]."""
    n, m = problem.shape
    program = linprog(
        np.concatenate([np.zeros(m), np.ones(n)]),
        A_ub=np.hstack([-problem.scaled, -np.eye(n)]),
        b_ub=-problem.required,
        A_eq=np.concatenate([np.ones(m), np.zeros(n)])[None],
        b_eq=[1.0],
        bounds=[*zip(problem.lower.tolist(), problem.upper.tolist(), strict=True), *[(0.0, np.inf)] * n],
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    # Some mixture keeps the bounds and the shortfall is free, so only rounding can fail the solver: no verdict then.
    return np.asarray(program.x[m:]) if program.x is not None else np.zeros(n)


def _source(limits: Sequence[Limit], bound: Array, j: SupportsIndex) -> str:
    return min(limits, key=lambda limit: abs(limit.bound[j] - bound[j])).name


def _sources(limits: Sequence[Limit], bound: Array) -> str:
    return " and ".join(limit.name for limit in limits if (limit.bound == bound).any())
