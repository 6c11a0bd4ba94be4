"""An interior point method for the mixture problem, whose linear systems have the size of the number of tasks."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import helmert

from tikmix_fast.mixture.direct.problem import Problem, Solution
from tikmix_fast.mixture.inputs import Array

__all__ = ["SMALLEST_DIVERSITY", "solve"]

SMALLEST_DIVERSITY = 1e-5
"""The least reliable weight of the entropy, relative to the objective's largest weight."""

# Relaxation of Pareto and the KL limit, so that an interior exists even where only the prior satisfies them.
_RELAX = 1e-10
_TOLERANCE = 1e-10
_SMALLEST_BARRIER = 1e-12
_ACCEPTED = 1e-8
_SHORT = 0.1


@dataclass(frozen=True, eq=False)
class _State:
    """A point of the iteration, or a step between two. All but ``u`` and ``total`` stay positive in a point."""

    weights: Array  # [k] weights of the free domains; their distances to both bounds stay positive too
    below: Array  # [k] prices of the lower bounds
    above: Array  # [k] prices of the upper bounds
    slack: Array  # [c] slacks of Pareto per task, then of the KL limit
    price: Array  # [c] their prices
    u: Array  # [n - 1] slope of the objective in x, |u| <= radius
    ball: float  # price of |u| <= radius
    total: float  # price of the weights' sum

    def moved(self, step: _State, length: float) -> _State:
        return _State(*(getattr(self, each.name) + length * getattr(step, each.name) for each in fields(self)))


class _Reduced:
    """The problem in its free domains.

    Let x be the n - 1 orthonormal contrasts of the scaled influence. The std is ``|x| / sqrt(n)``, and its term in the
    objective is the maximum of ``u @ x`` over ``|u| <= radius``. ``rows`` holds the gradients of x, of minus Pareto per
    task, and of the KL divergence.
    """

    def __init__(self, problem: Problem, free: NDArray[np.bool_]) -> None:
        fixed = np.where(free, 0.0, problem.lower)
        self.cost, self.diversity = problem.cost[free], problem.diversity
        self.lower, self.mass = problem.lower[free], 1.0 - fixed.sum()
        upper = problem.upper[free]
        # Move an upper bound that the sum already implies out of the way.
        self.upper = np.where(upper >= self.mass, 2.0 * self.mass, upper)
        self.log_prior = np.log(np.where(problem.prior > 0, problem.prior, 1.0)[free])

        gain, settled = problem.scaled[:, free], problem.scaled @ fixed
        self.n_std = len(gain) - 1 if problem.uniformity > 0 else 0
        self.radius2 = problem.uniformity**2 / len(gain)
        contrasts = helmert(len(gain))[: self.n_std]
        self.x_settled = contrasts @ settled
        contested = problem.contested
        self.demand, self.required = gain[contested], (problem.required - settled)[contested] - _RELAX
        self.max_kl = None
        if problem.max_kl is not None:
            self.max_kl = problem.max_kl - _partial_kl(fixed, problem.prior) + _RELAX
        self._rows = np.concatenate([contrasts @ gain, -self.demand])

    def start(self) -> _State:
        upper = np.minimum(self.upper, self.mass)
        inside = (self.mass - self.lower.sum()) / (upper - self.lower).sum()
        weights = self.lower + inside * (upper - self.lower)
        k, size = len(weights), np.abs(self.demand).max(axis=1, initial=0.0)
        if self.max_kl is not None:
            size = np.append(size, 1.0)
        x = self.x(weights)
        u, ball = self.fitted(x, max(float(np.sqrt(self.radius2 * (x @ x))), 1e-3))
        return _State(
            weights=weights,
            below=1.0 / (k * (weights - self.lower)),
            above=1.0 / (k * (self.upper - weights)),
            slack=np.maximum(self.room(weights), 0.1 * size),
            # Start high: prices reach 1e5 where Pareto leaves little room, and they grow slowly.
            price=10.0 / np.maximum(1.0, size),
            u=u,
            ball=ball,
            total=0.0,
        )

    def fitted(self, x: Array, barrier: float) -> tuple[Array, float]:
        """Return u and the price of its ball with ``x == 2 ball u`` and ``ball (radius^2 - |u|^2) == barrier``."""
        if not self.n_std:
            return x, 1.0
        ball = (barrier + float(np.sqrt(barrier**2 + self.radius2 * (x @ x)))) / (2.0 * self.radius2)
        return x / (2.0 * ball), ball

    def x(self, weights: Array) -> Array:
        return np.asarray(self._rows[: self.n_std] @ weights + self.x_settled)

    def room(self, weights: Array) -> Array:
        """Return the slacks [c] of Pareto and of the KL limit at the weights."""
        room: Array = self.demand @ weights - self.required
        if self.max_kl is None:
            return room
        divergence = float(weights @ (np.log(weights) - self.log_prior))
        return np.append(room, self.max_kl - divergence)

    def complementarity(self, state: _State) -> tuple[float, int]:
        """Return the sum of slack times price over all inequalities, and their number."""
        gap = state.slack @ state.price
        gap += (state.weights - self.lower) @ state.below + (self.upper - state.weights) @ state.above
        count = len(state.slack) + 2 * len(state.weights)
        if self.n_std:
            gap, count = gap + state.ball * (self.radius2 - state.u @ state.u), count + 1
        return float(gap), count

    def rows(self, weights: Array) -> Array:
        if self.max_kl is None:
            return self._rows
        return np.concatenate([self._rows, (np.log(weights) - self.log_prior + 1.0)[None]])


class _Newton:
    """The linear system at one state, reduced to the multipliers u and the prices of the constraints."""

    def __init__(self, reduced: _Reduced, state: _State) -> None:
        self.reduced, self.state = reduced, state
        n, weights = reduced.n_std, state.weights
        self.from_lower, self.from_upper = weights - reduced.lower, reduced.upper - weights
        self.inside = reduced.radius2 - float(state.u @ state.u)
        self.x, self.room, self.rows = reduced.x(weights), reduced.room(weights), reduced.rows(weights)
        temperature = reduced.diversity + (state.price[-1] if reduced.max_kl is not None else 0.0)
        self.slope = (
            reduced.cost
            + reduced.diversity * (1.0 + np.log(weights))
            + np.concatenate([state.u, state.price]) @ self.rows
            + state.total
            - state.below
            + state.above
        )
        self.excess = float(weights.sum() - reduced.mass)
        self.answer = 1.0 / (temperature / weights + state.below / self.from_lower + state.above / self.from_upper)
        self.answers = self.rows * self.answer
        self.sums = self.answers.sum(axis=1)
        system = self.answers @ self.rows.T - np.outer(self.sums, self.sums) / self.answer.sum()
        tail = np.arange(n, len(system))
        system[tail, tail] += state.slack / state.price
        if n:
            head = np.arange(n)
            system[head, head] += 2.0 * state.ball
            system[:n, :n] += 4.0 * state.ball / self.inside * np.outer(state.u, state.u)
        self.system = system

    def residual(self) -> float:
        """Return the largest violation of the optimality conditions other than complementarity."""
        state = self.state
        parts = [self.slope, np.array([self.excess]), self.room - state.slack, self.x - 2.0 * state.ball * state.u]
        return float(np.abs(np.concatenate(parts)).max())

    def step(self, barrier: float, predicted: _State | None) -> _State:
        """Return the step towards slack times price equal to ``barrier``, corrected for the predicted step."""
        state, n = self.state, self.reduced.n_std
        lower = upper = slack = np.asarray(barrier)
        inside: float = barrier
        if predicted is not None:
            lower = barrier - predicted.below * predicted.weights
            upper = barrier + predicted.above * predicted.weights
            slack = barrier - predicted.price * predicted.slack
            along = float(predicted.u @ predicted.u)
            inside = barrier + 2.0 * predicted.ball * float(state.u @ predicted.u) + state.ball * along
        slope = self.slope + state.below - lower / self.from_lower - state.above + upper / self.from_upper
        total = (self.excess - self.answer @ slope) / self.answer.sum()
        right = np.concatenate(
            [self.x - 2.0 * inside / self.inside * state.u if n else [], slack / state.price - self.room]
        )
        multipliers = np.linalg.solve(self.system, right - self.answers @ slope - self.sums * total)
        total -= (self.sums @ multipliers) / self.answer.sum()
        weights = -self.answer * (slope + multipliers @ self.rows + total)
        u = multipliers[:n]
        return _State(
            weights=weights,
            below=(lower - state.below * weights) / self.from_lower - state.below,
            above=(upper + state.above * weights) / self.from_upper - state.above,
            slack=self.room - state.slack - self.rows[n:] @ weights,
            price=multipliers[n:],
            u=u,
            ball=float(inside + 2.0 * state.ball * (state.u @ u)) / self.inside - state.ball if n else 0.0,
            total=float(total),
        )

    def longest(self, step: _State) -> float:
        """Return the largest part of the step, at most 1, that makes nothing negative and keeps u in its ball."""
        state = self.state
        now = np.concatenate(
            [self.from_lower, self.from_upper, state.below, state.above, state.slack, state.price, [state.ball]]
        )
        change = np.concatenate(
            [step.weights, -step.weights, step.below, step.above, step.slack, step.price, [step.ball]]
        )
        length = 1.0 / max(1.0, float(np.max(-change / now)))
        square = float(step.u @ step.u)
        if square > 0:
            toward = float(state.u @ step.u)
            length = min(length, float(np.sqrt(toward**2 + square * self.inside) - toward) / square)
        return length

    def gap(self, spread: float) -> float:
        """Bound the objective's distance from the optimum by weak duality, given the std term."""
        state = self.state
        gap = spread - float(state.u @ self.x) + float(state.price @ self.room)
        gap += float(self.from_lower @ state.below + self.from_upper @ state.above)
        return abs(gap) + 2.0 * float(np.abs(self.slope).max())


def solve(problem: Problem, max_iterations: int = 60) -> Solution:
    """Solve by Mehrotra's predictor-corrector method (Nocedal and Wright 2006, chapters 14 and 19).

    Elimination of the weights reduces each Newton system to the size of the dual: a multiplier per task for the std,
    one per task for Pareto, and one for the KL limit. An iteration costs O(m n^2) for m domains and n tasks; 10 to 25
    are usual. Pareto and the KL limit hold to 1e-9, the bounds exactly. The gap is a bound, from weak duality. It may
    stay above 1e-8 if the diversity is below `SMALLEST_DIVERSITY` times the largest of the objective's weights.

    Without a std term the capped tilt comes first: if it meets Pareto and the KL limit, it is the answer. If the
    iteration fails, as it does for one in a thousand deliberately bad problems, it runs again with shorter steps.
    """
    if only := problem.only_mixture():
        return only
    if problem.diversity > 0 and (problem.uniformity == 0 or len(problem.scaled) == 1):
        weights = problem.nearest(-problem.cost / problem.diversity)
        if not problem.violations(weights):
            return Solution(weights, True, 0.0, 0, "closed form: a tilt that meets every constraint")
    with np.errstate(all="ignore"):
        solution = _iterate(problem, max_iterations, cautious=False)
        if not solution.converged:
            solution = _iterate(problem, 4 * max_iterations, cautious=True)
    return solution


def _iterate(problem: Problem, max_iterations: int, cautious: bool) -> Solution:
    free = problem.lower < problem.upper
    reduced = _Reduced(problem, free)
    state = reduced.start()
    message, length = "the interior point method reached its iteration limit", 1.0
    for nit in range(max_iterations + 1):  # noqa: B007
        newton = _Newton(reduced, state)
        gap, count = reduced.complementarity(state)
        if gap < _TOLERANCE + 2.0 * count * _SMALLEST_BARRIER and newton.residual() < _TOLERANCE:
            message = "the interior point method converged"
            break
        try:
            predicted, centring = None, 0.3
            if not cautious:
                predicted = newton.step(0.0, None)
                reach = newton.longest(predicted)
                ahead, _ = reduced.complementarity(state.moved(predicted, reach))
                centring = max((ahead / gap) ** 3, 1e-3 if length > _SHORT else 0.5)
                predicted = predicted if reach > _SHORT else None
            barrier = max(centring * gap / count, _SMALLEST_BARRIER)
            step = newton.step(barrier, predicted)
        except np.linalg.LinAlgError:
            message = "the interior point method met a singular system"
            break
        length = min(1.0, (0.9 if cautious else 0.99) * newton.longest(step))
        if not length > 0:
            message = "the interior point method broke down"
            break
        state = state.moved(step, length)
        inside = reduced.radius2 - float(state.u @ state.u)
        if reduced.n_std and length < _SHORT and state.ball * inside < 0.01 * barrier:
            # u presses against its ball and blocks the whole step: reset it to satisfy its own conditions.
            u, ball = reduced.fitted(reduced.x(state.weights), barrier)
            state = replace(state, u=u, ball=ball)
    spread = problem.uniformity * float(np.sqrt(newton.x @ newton.x / len(problem.scaled)))
    gap = newton.gap(spread)
    weights = problem.lower.copy()
    weights[free] = state.weights
    weights = problem.nearest(np.log(np.maximum(weights, np.finfo(np.float64).tiny)))
    converged = gap <= _ACCEPTED * max(1.0, abs(problem.objective(weights)))
    return Solution(weights, converged, gap, nit, f"{message}, within {gap:.1e} of the optimum")


def _partial_kl(weights: Array, prior: Array) -> float:
    positive = weights > 0
    return float(weights[positive] @ np.log(weights[positive] / prior[positive]))
