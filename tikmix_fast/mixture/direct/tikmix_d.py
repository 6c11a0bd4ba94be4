"""TiKMiX-D: the best mixture by Group Influence, from direct convex optimisation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tikmix_fast.arguments import require_choice
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.mixture.direct import interior_point as interior
from tikmix_fast.mixture.direct import slsqp
from tikmix_fast.mixture.direct.bounds import check_feasible, join_bounds, require_within
from tikmix_fast.mixture.direct.confidence import cautious_step, known_shares
from tikmix_fast.mixture.direct.problem import (
    Limit,
    Norm,
    Problem,
    Solution,
    kl_divergence,
    objective_terms,
    row_scale,
)
from tikmix_fast.mixture.inputs import Array, Names, per_domain, read_matrix, read_number, read_objective, read_prior
from tikmix_fast.mixture.result import MixtureResult

PerDomain = float | Mapping[str, float] | Any

__all__ = ["tikmix_d"]

_SLSQP_FALLBACK = 128
_ACTIVE = 1e-8


def tikmix_d(
    matrix: InfluenceMatrix | Any,
    prior: Mapping[str, float] | Any,
    uniformity: float = 1.0,
    influence: float = 1.0,
    diversity: float = 1.0,
    *,
    norm: Norm = "max",
    pareto: bool = True,
    floor: PerDomain = 0.0,
    cap: PerDomain = 1.0,
    supply: PerDomain | None = None,
    stage_tokens: float | None = None,
    max_epochs: float = 1.0,
    max_kl: float | None = None,
    smoothing: float = 0.0,
    confidence: float | None = None,
    solver: Literal["auto", "slsqp", "interior"] = "auto",
) -> MixtureResult:
    """Find the mixture that helps all tasks most, given the influence of the domains on them.

    Minimises over mixtures w (TiKMiX, arXiv 2508.17677, Eqs. 9 to 11)::

        uniformity * std(P) - influence * sum(P) - diversity * H(w),    P_i = (S w)_i / scale_i,

    subject to ``S w >= S prior`` for every task. The std is over tasks, with ddof 0; H is the entropy in nats. The
    problem is convex, and with ``diversity > 0`` it has one optimum, which does not change when a row of S is
    multiplied by a positive number. S is a slope at one checkpoint: move in steps (``max_kl``, ``smoothing``) and
    measure again.

    The default gives rather even mixtures: sum(P) of n tasks is at most n, against an entropy of up to log m, so with
    ``diversity=1`` the largest weight is seldom more than ten times the smallest. A ``diversity`` of 0.3 moves much
    further. Smaller values collapse onto few domains; ``floor``, ``cap`` and ``max_kl`` prevent that. Check
    ``result.effective_domains``.

    Parameters
    ----------
    matrix : InfluenceMatrix or array_like [n, m]
        Group Influence S of m domains (columns) on n tasks (rows); positive lowers the task's loss. A column of NaN is
        an unmeasured domain: it keeps its prior weight, and its unknown influence counts as zero.
    prior : mapping from domain name to weight, or array_like [m]
        The mixture in use now; at least 0, sums to 1 within 1e-6.
    uniformity, influence, diversity : float
        Weights of the three terms (alpha, beta, gamma of the paper, all 1 there), at least 0, not all 0.
    norm : {"max", "maxabs", "std"}
        scale_i: the row's maximum (paper), largest magnitude, or standard deviation. If the maximum (or standard
        deviation) is negative, or at most 1e-3 of the largest magnitude, that magnitude is the scale, with a warning:
        the paper's formula would reverse such a task. A row of zeros stays as it is.
    pareto : bool
        Whether no task may be predicted to fare worse than under the prior. The prediction is as exact as S: see its
        ``stderr``.
    floor, cap : float, mapping or array_like [m]
        Least and largest weight of each domain. A mapping may name some domains; the others get 0 and 1.
    supply : mapping or array_like [m], optional
        Tokens that each domain has; ``inf`` for no limit. Needs ``stage_tokens``.
    stage_tokens : float, optional
        Tokens to train on with the mixture: ``w * stage_tokens <= max_epochs * supply``.
    max_epochs : float
        The largest number of passes through a domain's supply.
    max_kl : float, optional
        Largest KL(w || prior) in nats, above 0. A domain of prior zero then stays at zero.
    smoothing : float
        Share of the prior in the answer, 0 to 1: ``w <- smoothing * prior + (1 - smoothing) * w``, after solving.
        Pareto and the KL limit are convex, so they still hold. Refused if the prior itself is outside the bounds.
    confidence : float, optional
        Between 0 and 1, for an `InfluenceMatrix` with standard errors; 0.5 is mild, 0.95 strict. Take the difference of
        a domain's column from the prior mixture, and the lower confidence bound of that difference. Their ratio is the
        largest share of its way from the prior to its solved weight that the domain may move. A larger error never
        moves more weight; a domain with an unknown error (too few micro-batches) does not move; without error this is
        the plain solution. Refused if the prior itself is outside the bounds.
    solver : {"auto", "slsqp", "interior"}
        ``"slsqp"``: SLSQP from two starts, as in the paper. ``"interior"``: an interior point method whose systems have
        the size of the number of tasks; it finds the same optimum several times faster. ``"auto"``: the interior point
        method at any size. If a solver fails its checks, the other one tries (SLSQP up to 128 domains).

    Returns
    -------
    MixtureResult
        Its weights passed the checks of the simplex, bounds, Pareto (to 1e-9 of a task's scale) and KL. If no solver
        passes them, ``weights`` is the prior, ``success`` is False and a warning says so.

    Raises
    ------
    ValueError
        If an argument is out of range, a name is unknown or missing, or the constraints exclude each other; the message
        names the constraint and the domain or task.
    TypeError
        If an argument does not consist of numbers.

    Warns
    -----
    UserWarning
        For a row divided by its magnitude, a raised diversity, the failure of the solver asked for, and the failure of
        all. The texts are in ``result.warnings`` too.

    Notes
    -----
    The interior point method needs a ``diversity`` of at least 1e-5 of the larger of ``uniformity`` and ``influence``.
    It raises a smaller one, zero included, to that value. The objective is then within 1e-5 log m, times that larger
    weight, of its optimum, and the answer is the most even of equally good mixtures. ``solver="slsqp"`` keeps the
    diversity, so its answer need not be unique.

    On two cores, 26 domains and 9 tasks take about 6 ms by the interior point method and 70 ms by SLSQP; 1000 domains
    and 32 tasks take the former 18 ms.

    Examples
    --------
    >>> matrix = InfluenceMatrix.from_values(
    ...     [[2.0, 1.0, -1.0], [1.0, 3.0, 0.0]], tasks=["qa", "code"], domains=["web", "github", "noise"]
    ... )
    >>> result = tikmix_d(matrix, {"web": 0.5, "github": 0.2, "noise": 0.3}, diversity=0.5, cap={"github": 0.5})
    >>> {name: round(weight, 3) for name, weight in result.as_dict().items()}
    {'web': 0.462, 'github': 0.5, 'noise': 0.038}
    >>> result.success, result.active
    (True, ('cap: github',))
    """
    values, measured, tasks, domains = read_matrix(matrix)
    m = values.shape[1]
    start = read_prior(prior, domains, m)
    factors = read_objective(uniformity, influence, diversity)
    smoothing = read_number("smoothing", smoothing, most=1.0)
    confidence = _read_confidence(confidence, matrix)
    require_choice("solver", solver, ("auto", "slsqp", "interior"))
    limit_kl = None if max_kl is None else read_number("max_kl", max_kl, positive=True)

    floors = [Limit("floor", per_domain("floor", floor, domains, m, default=0.0))]
    caps = _caps(cap, supply, stage_tokens, max_epochs, domains, m)
    if limit_kl is not None:
        caps.append(Limit("max_kl (zero where the prior is)", np.where(start > 0, 1.0, 0.0)))
    lower, upper = join_bounds(floors, caps, start, measured, domains)
    for argument, moves_to_prior, off in (("smoothing", smoothing > 0, 0), ("confidence", confidence, None)):
        if moves_to_prior:
            message = f"{argument} must be {off} where the prior is outside the bounds"
            require_within(start, lower, upper, domains, message)

    scale, warned = row_scale(values[:, measured], norm, tasks)
    problem = _pose(values / scale[:, None], factors, start, lower, upper, bool(pareto), limit_kl, tasks)
    binding = [each.name for each in floors if each.bound.any()]
    binding += [each.name for each in caps if (each.bound < 1).any()]
    check_feasible(problem, " and ".join(binding))
    resolved = max(factors[2], interior.SMALLEST_DIVERSITY * max(factors[:2])) / max(factors)
    answer = _solve(problem, solver, resolved, smoothing, warned)
    if confidence is not None:
        answer = _shortened(problem, answer, known_shares(matrix, scale, start, confidence), confidence)
    for each in warned:
        warnings.warn(each, stacklevel=2)
    return _result(problem, answer, factors, values, measured, domains, floors + caps, warned)


@dataclass(frozen=True, eq=False)
class _Answer:
    """The checked weights with their solver's name and the course in words; the prior if ``solution`` is None."""

    solution: Solution | None
    weights: Array
    solver: str
    message: str
    shares: Array | None = None


def _pose(
    scaled: Array,
    factors: tuple[float, float, float],
    prior: Array,
    lower: Array,
    upper: Array,
    pareto: bool,
    max_kl: float | None,
    tasks: Names,
) -> Problem:
    """Return the problem with the objective's factors divided by the largest of them."""
    uniformity, influence, diversity = (each / max(factors) for each in factors)
    cost = -influence * scaled.sum(axis=0)
    return Problem(scaled, cost, prior, lower, upper, uniformity, diversity, pareto, max_kl, tasks)


def _result(
    problem: Problem,
    answer: _Answer,
    factors: tuple[float, float, float],
    values: Array,
    measured: NDArray[np.bool_],
    domains: Names,
    bounds: Sequence[Limit],
    warned: Sequence[str],
) -> MixtureResult:
    weights, solution, names = answer.weights, answer.solution, domains or range(len(measured))
    kept = tuple(names[j] for j in np.flatnonzero(~measured))
    note = f"; never measured, at prior weight: {', '.join(map(str, kept))}" if kept else ""
    terms = objective_terms(problem.scaled @ weights, weights)
    uniformity, influence, diversity = factors
    return MixtureResult(
        weights=weights,
        prior=problem.prior,
        domains=domains,
        tasks=problem.tasks,
        success=solution is not None,
        status=int(solution is None),
        message=answer.message + note,
        fun=uniformity * terms["uniformity"] - influence * terms["influence"] - diversity * terms["diversity"],
        nit=solution.nit if solution else 0,
        terms=terms,
        predicted=values @ weights,
        predicted_prior=values @ problem.prior,
        effective_domains=math.exp(terms["diversity"]),
        active=_active(problem, bounds, weights, measured, domains),
        kept=kept,
        solver=answer.solver,
        gap=solution.gap * max(factors) if solution else math.nan,
        warnings=tuple(warned),
        known=answer.shares,
    )


def _read_confidence(confidence: Any, matrix: Any) -> float | None:
    if confidence is None:
        return None
    number = read_number("confidence", confidence)
    if not 0 < number < 1:
        raise ValueError(f"confidence must lie between 0 and 1; got {number:g}")
    if not isinstance(matrix, InfluenceMatrix):
        raise ValueError("confidence needs standard errors: pass an InfluenceMatrix, not a plain array")
    return number


def _shortened(problem: Problem, answer: _Answer, shares: Array, confidence: float) -> _Answer:
    """Return the answer after a cautious step, with the shares that limit it."""
    if answer.solution is None:
        return replace(answer, shares=shares)
    weights = cautious_step(problem, answer.weights, shares)
    whole = float(np.abs(answer.weights - problem.prior).sum())
    part = float(np.abs(weights - problem.prior).sum()) / whole if whole > 0 else 1.0
    message = f"{answer.message}; confidence {confidence:g} left {part:.0%} of the step"
    return replace(answer, weights=weights, shares=shares, message=message)


def _caps(
    cap: PerDomain, supply: PerDomain | None, stage_tokens: float | None, max_epochs: float, domains: Names, m: int
) -> list[Limit]:
    caps = [Limit("cap", per_domain("cap", cap, domains, m, default=1.0))]
    if (supply is None) != (stage_tokens is None):
        raise ValueError("supply and stage_tokens must be given together; got only one of them")
    if supply is None and max_epochs != 1.0:
        raise ValueError("max_epochs needs supply and stage_tokens; got neither")
    if supply is not None:
        tokens = per_domain("supply", supply, domains, m)
        epochs = read_number("max_epochs", max_epochs, positive=True)
        caps.append(Limit("supply", epochs * tokens / read_number("stage_tokens", stage_tokens, positive=True)))
    return caps


def _solve(problem: Problem, solver: str, resolved: float, smoothing: float, warned: list[str]) -> _Answer:
    """Return the first solution that passes its checks, and add warnings to ``warned``.

    ``resolved`` is the diversity for the interior point method.
    """
    m = problem.shape[1]
    order = ["slsqp", "interior"] if solver == "slsqp" else ["interior", "slsqp"]
    if solver != "slsqp" and m > _SLSQP_FALLBACK:
        order.pop()
    failures: list[str] = []
    for each in order:
        solution = slsqp.solve(problem) if each == "slsqp" else interior.solve(replace(problem, diversity=resolved))
        solution = replace(solution, weights=smoothing * problem.prior + (1.0 - smoothing) * solution.weights)
        violations = problem.violations(solution.weights)
        if violations or not solution.converged:
            failures.append("; ".join([f"{each}: {solution.message}", *violations]))
            continue
        raised = resolved - problem.diversity if each == "interior" else 0.0
        if raised > 0:
            warned.append(
                f"diversity was raised to {interior.SMALLEST_DIVERSITY:g} of the larger of uniformity and influence,"
                " the least that the interior point method resolves"
            )
            solution = replace(solution, gap=solution.gap + raised * math.log(m))
        message = "; ".join([*failures, solution.message])
        if failures and solver != "auto":
            warned.append(f"solver={solver!r} failed, solved by {each!r} instead: {message}")
        return _Answer(solution, solution.weights, each, message)
    message = "; ".join(failures) + "; the prior is returned"
    violations = problem.violations(problem.prior)
    if violations:
        message += f", which itself misses: {'; '.join(violations)}"
    warned.append(message)
    return _Answer(None, problem.prior.copy(), "none", message)


def _active(
    problem: Problem, bounds: Sequence[Limit], weights: Array, measured: NDArray[np.bool_], domains: Names
) -> tuple[str, ...]:
    """Name the constraints that hold with equality, without the natural bounds 0 and 1."""
    tasks, columns = problem.tasks or range(problem.shape[0]), domains or range(problem.shape[1])
    active = []
    if problem.pareto:
        slack = problem.scaled @ weights - problem.required
        active += [f"pareto: {tasks[i]}" for i in np.flatnonzero(slack <= _ACTIVE)]
    for limit in bounds:
        at = measured & (np.abs(weights - limit.bound) <= _ACTIVE) & (limit.bound > 0) & (limit.bound < 1)
        active += [f"{limit.name}: {columns[j]}" for j in np.flatnonzero(at)]
    if problem.max_kl is not None and kl_divergence(weights, problem.prior) >= problem.max_kl - _ACTIVE:
        active.append("max_kl")
    return tuple(active)
