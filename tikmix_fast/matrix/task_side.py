"""The task side's part of the error of the influence, summed over rounds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tikmix_fast.matrix.microbatch_record import Array
from tikmix_fast.matrix.query_round import QueryRound

__all__ = ["TaskSide"]


# Multiplying the weights by a factor multiplies these sums by this power of it.
_POWERS = {"task_variance": 2, "task_spread": 4, "both": 2, "between": 2, "task_rounds": 2}


class TaskSide(NamedTuple):
    """Sums over rounds, in units of sum a_b (see `Estimator`). Never changed in place.

    Attributes
    ----------
    task_variance : float64 [n, m]
        Variance of the task side.
    task_spread : float64 [n, m]
        Its square over its degrees of freedom.
    both : float64 [n, m]
        The part of ``task_variance`` that is the product of both sides' noise.
    between : float64 [n, m]
        The part of ``task_variance`` that also shows in the spread of single micro-batches.
    rounds : float64 [3, m]
        Sums of f, f^2 and f^3 over rounds, where f is the weight of a round.
    task_rounds : float64 [2, n, m]
        Sums of a round's squared weighted tokens: over all rounds, and over those that tell the task's variance.
    """

    task_variance: Array
    task_spread: Array
    both: Array
    between: Array
    rounds: Array
    task_rounds: Array

    @classmethod
    def empty(cls, n: int, m: int) -> TaskSide:
        """Return the sums over no round."""
        variance, spread, both, between = np.zeros((4, n, m))
        return cls(variance, spread, both, between, np.zeros((3, m)), np.zeros((2, n, m)))

    def faded(self, factor: float) -> TaskSide:
        """Return the sums with the weight of every round multiplied by ``factor``."""
        sums = {name: getattr(self, name) * factor**power for name, power in _POWERS.items()}
        return self._replace(rounds=self.rounds * np.array([[factor], [factor**2], [factor**3]]), **sums)

    def without(self, domains: NDArray[np.bool_]) -> TaskSide:
        """Return the sums with zeros for some domains [m]."""
        return TaskSide(*(np.where(domains, 0.0, each) for each in self))

    def with_round(self, added: QueryRound) -> TaskSide:
        """Return the sums with one more round, of weight 1."""
        if not added.tokens.any():
            return self
        side = TaskSide(*(each.copy() for each in self))
        measured = added.tokens > 0
        side.rounds[:] += measured
        alike = np.where(measured, added.tokens_squared / np.where(measured, added.tokens, 1.0) ** 2, 0.0)
        for task in range(added.n):
            splits = int((added.owners == task).sum())
            side.task_rounds[0, task] += added.tokens**2
            if splits < 2:
                continue
            side.task_rounds[1, task] += added.tokens**2
            variance, both = added.variance(task)
            side.task_variance[task] += variance
            side.task_spread[task] += variance**2 / (splits - 1)
            side.both[task] += both
            side.between[task] += alike * np.maximum(variance - both, 0.0)
        return side

    def extrapolated(self) -> TaskSide:
        """Return the sums for all rounds: rounds that do not tell a task's variance get that of the rounds that do.

        NaN where no round tells it.
        """
        measured, known = self.task_rounds
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(measured > known, measured / known, 1.0)
            ratio = np.where(np.isfinite(ratio), ratio, np.nan)
        scaled = {name: getattr(self, name) * ratio for name in ("task_variance", "both", "between")}
        return self._replace(task_spread=self.task_spread * ratio**2, **scaled)
