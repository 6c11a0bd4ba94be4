"""From inner products of micro-batches to the influence matrix and its standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tikmix_fast.influence.matrix import InfluenceMatrix

__all__ = ["Estimator"]

Array = NDArray[np.float64]


class Estimator:
    """Token-weighted mean over micro-batches with its standard error, kept as sums that can be merged.

    For micro-batch b with N_b target tokens of domain j, let a_b = N_b <q_i, mean gradient>. The estimate is R = sum
    a_b / sum N_b, a ratio estimator; its domain-side variance over k micro-batches is k / (k - 1) sum (a_b - R N_b)^2 /
    (sum N_b)^2.

    The task side has an error of its own. Every task's batches are dealt into splits, each with a query of its own; the
    spread of R over the splits of one round (between refreshes) gives the variance of their weighted mean.

    Parameters
    ----------
    n, m : int
        Number of tasks and of domains.
    """

    def __init__(self, n: int, m: int) -> None:
        self.n, self.m = n, m
        self.reset()

    def reset(self) -> None:
        """Forget every micro-batch."""
        n, m = self.n, self.m
        self._microbatches = np.zeros(m, dtype=np.int64)
        self._tokens, self._tokens_squared = np.zeros(m), np.zeros(m)
        self._sum, self._squares, self._cross = np.zeros((n, m)), np.zeros((n, m)), np.zeros((n, m))
        # Task side, closed rounds: sum of variances, and of variance^2 / degrees of freedom, in units of sum a_b.
        self._task_variance, self._task_spread = np.zeros((n, m)), np.zeros((n, m))
        self._task_known = np.ones((n, m), dtype=bool)
        self._round: Array | None = None
        self._weights, self._owners = np.zeros(0), np.zeros(0, dtype=np.int64)

    def begin_round(self, owners: Sequence[int], weights: Sequence[float]) -> None:
        """Start a round of frozen queries: query q belongs to task ``owners[q]`` and weighs ``weights[q]`` in it."""
        self.end_round()
        self._owners = np.asarray(owners, dtype=np.int64)
        self._weights = np.asarray(weights, dtype=np.float64)
        self._round = np.zeros((len(self._owners), self.m))

    def end_round(self) -> None:
        """Close the round: its task-side variance is kept, its queries are forgotten."""
        variance, spread, known = self._task_side()
        self._task_variance, self._task_spread, self._task_known = variance, spread, known
        self._round = None

    def add(self, products: Array, tokens: Array) -> None:
        """Take one micro-batch.

        Parameters
        ----------
        products : float64 [q, m]
            <query, sum over the target tokens of the domain of the gradient of their loss>.
        tokens : float64 [m]
            Target tokens of each domain in it.
        """
        if self._round is None:
            raise RuntimeError("no queries: begin a round first")
        combined = np.zeros((self.n, self.m))
        np.add.at(combined, self._owners, self._weights[:, None] * products)
        self._round += products
        self._microbatches += tokens > 0
        self._tokens += tokens
        self._tokens_squared += tokens**2
        self._sum += combined
        self._squares += combined**2
        self._cross += combined * tokens

    def matrix(
        self, tasks: Sequence[str], domains: Sequence[str], dropped: int = 0, settings: Mapping[str, Any] | None = None
    ) -> InfluenceMatrix:
        """Return the matrix of all micro-batches so far."""
        count = self._microbatches.astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.where(self._tokens > 0, self._sum / self._tokens, np.nan)
            residual = self._squares - 2 * values * self._cross + values**2 * self._tokens_squared
            domain_variance = count / (count - 1) * np.maximum(residual, 0) / self._tokens**2
            domain_variance[:, count < 2] = np.nan
            variance, spread, known = self._task_side()
            task_variance = np.where(known, variance, np.nan) / self._tokens**2
            total = domain_variance + task_variance
            dof = total**2 / (domain_variance**2 / (count - 1) + spread / self._tokens**4)
        return InfluenceMatrix(
            values=values,
            stderr=np.sqrt(total),
            tokens=self._tokens.copy(),
            tasks=tuple(tasks),
            domains=tuple(domains),
            stderr_domain=np.sqrt(domain_variance),
            stderr_task=np.sqrt(task_variance),
            dof=dof,
            microbatches=self._microbatches.copy(),
            dropped=dropped,
            settings=dict(settings or {}),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as plain JSON types. The open round is closed in them: queries are not saved."""
        variance, spread, known = self._task_side()
        return {
            "microbatches": self._microbatches.tolist(),
            "tokens": self._tokens.tolist(),
            "tokens_squared": self._tokens_squared.tolist(),
            "sum": self._sum.tolist(),
            "squares": self._squares.tolist(),
            "cross": self._cross.tolist(),
            "task_variance": variance.tolist(),
            "task_spread": spread.tolist(),
            "task_known": known.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the sums that `state_dict` gave; nothing changes if they do not fit.

        Raises
        ------
        ValueError
            If a sum is missing or has the wrong shape.
        """
        shapes = {
            "microbatches": (self.m,),
            "tokens": (self.m,),
            "tokens_squared": (self.m,),
            **dict.fromkeys(
                ("sum", "squares", "cross", "task_variance", "task_spread", "task_known"), (self.n, self.m)
            ),
        }
        if not isinstance(state, Mapping) or set(state) != set(shapes):
            raise ValueError(f"state 'estimator' must be a mapping with {', '.join(shapes)}")
        read: dict[str, Any] = {}
        for name, shape in shapes.items():
            kind = {"microbatches": np.int64, "task_known": np.bool_}.get(name, np.float64)
            read[name] = np.array(state[name], dtype=kind)
            if read[name].shape != shape:
                raise ValueError(f"state {name!r} must have shape {shape}; got {read[name].shape}")
        for name, value in read.items():
            setattr(self, f"_{name}", value)
        self._round = None

    def _task_side(self) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Return variance [n, m] of sum a_b from the task side, sum of variance^2 / dof, and whether it is known."""
        variance, spread, known = self._task_variance.copy(), self._task_spread.copy(), self._task_known.copy()
        if self._round is None or not self._round.any():
            return variance, spread, known
        for task in range(self.n):
            mine = self._owners == task
            splits, weights = self._round[mine], self._weights[mine][:, None]
            count = len(splits)
            if count < 2:
                known[task] = False
                continue
            mean = (weights * splits).sum(0)
            of_round = count / (count - 1) * (weights**2 * (splits - mean) ** 2).sum(0)
            variance[task] += of_round
            spread[task] += of_round**2 / (count - 1)
        return variance, spread, known
