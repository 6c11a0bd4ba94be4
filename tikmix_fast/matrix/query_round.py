"""Sums over the micro-batches of one round of frozen queries, split by split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tikmix_fast.matrix.microbatch_record import Array

__all__ = ["QueryRound", "ratio_variance", "read_arrays"]


_SUMS = ("tokens", "tokens_squared", "count", "sum", "squares", "cross", "task_squares", "task_cross")


class QueryRound:
    """The sums of one round: query q belongs to task ``owners[q]`` and has weight ``weights[q]`` in its mean.

    Parameters
    ----------
    owners : sequence of int [q]
    weights : sequence of float [q]
        Those of one task sum to 1.
    n, m : int
        Number of tasks and of domains.
    """

    def __init__(self, owners: Sequence[int], weights: Sequence[float], n: int, m: int) -> None:
        self.owners, self.weights = np.array(owners, dtype=np.int64), np.array(weights, dtype=np.float64)
        self.n = n
        queries = len(self.owners)
        self.tokens, self.tokens_squared, self.count = np.zeros(m), np.zeros(m), np.zeros(m)
        self.sum, self.squares, self.cross = np.zeros((queries, m)), np.zeros((queries, m)), np.zeros((queries, m))
        self.task_squares, self.task_cross = np.zeros((n, m)), np.zeros((n, m))
        # The first half of a task's batches is every other one of its splits.
        order = np.array([(self.owners[:q] == self.owners[q]).sum() for q in range(queries)], dtype=np.int64)
        self._first_weights = np.where(order % 2 == 0, self.weights, 0.0)

    def has_queries(self, owners: Sequence[int], weights: Sequence[float]) -> bool:
        """Tell whether the round's queries have these owners and exactly these weights."""
        return (self.owners.tolist(), self.weights.tolist()) == (list(owners), list(weights))

    def state_dict(self) -> dict[str, Any]:
        """Return all sums as plain JSON types."""
        return {name: getattr(self, name).tolist() for name in ("owners", "weights", *_SUMS)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], n: int, m: int) -> QueryRound:
        """Read the output of `state_dict` for n tasks and m domains.

        Raises
        ------
        ValueError
            If a part is missing, has another shape, or names an unknown task.
        """
        names = {"owners", "weights", *_SUMS}
        if not isinstance(state, Mapping) or set(state) != names:
            raise ValueError(f"state 'round' must be a mapping with {', '.join(sorted(names))}")
        if not set(state["owners"]) <= set(range(n)):
            raise ValueError(f"state 'owners' must lie in 0 ... {n - 1}; got {sorted(set(state['owners']))}")
        if len(state["owners"]) != len(state["weights"]):
            raise ValueError(f"state 'weights' must have one number per owner; got {len(state['weights'])}")
        this = cls(state["owners"], state["weights"], n, m)
        for name, array in read_arrays(state, {name: getattr(this, name).shape for name in _SUMS}, {}).items():
            setattr(this, name, array)
        return this

    def add(self, products: Array, tokens: Array) -> Array:
        """Add one micro-batch, [q, m] and [m]; return its products with the tasks' mean queries, [n, m]."""
        combined = self.combine(products)
        self.tokens += tokens
        self.tokens_squared += tokens**2
        self.count += tokens > 0
        self.sum += products
        self.squares += products**2
        self.cross += products * tokens
        self.task_squares += combined**2
        self.task_cross += combined * tokens
        return combined

    def combine(self, products: Array) -> Array:
        """Turn products with each query [q, m] into products with each task's mean query [n, m]."""
        return self._weighted(self.weights, products)

    def first_half(self, products: Array) -> tuple[Array, Array]:
        """Return the share of each task's tokens in its first half of splits [n], and that half's products [n, m]."""
        share = self._weighted(self._first_weights, np.ones((len(self.owners), 1)))[:, 0]
        return share, self._weighted(self._first_weights, products)

    def _weighted(self, weights: Array, products: Array) -> Array:
        total = np.zeros((self.n, products.shape[1]))
        np.add.at(total, self.owners, weights[:, None] * products)
        return total

    def variance(self, task: int) -> tuple[Array, Array]:
        """Return the task-side variance [m] of the round's sum a_b, and the part of it that is both sides' noise.

        The task must have two splits or more.
        """
        mine = self.owners == task
        weights = self.weights[mine][:, None]
        splits = self.sum[mine]
        mean = (weights * splits).sum(0)
        # Unbiased if a split's variance is inversely proportional to its tokens.
        task_variance = (weights * (splits - mean) ** 2).sum(0) / (len(splits) - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            correction = self.count / (self.count - 1)
        single = ratio_variance(
            correction, splits, self.squares[mine], self.cross[mine], self.tokens, self.tokens_squared
        )
        whole = ratio_variance(
            correction, mean, self.task_squares[task], self.task_cross[task], self.tokens, self.tokens_squared
        )
        # Let V(q) = q' D q be the domain side's variance for the query q, and let split k have independent noise of
        # covariance C_k. Then E V(split k) = V(truth) + tr(D C_k), and E V(mean) = V(truth) + sum w_k^2 tr(D C_k).
        # These two equations give the last sum.
        squared = float((weights**2).sum())
        with np.errstate(invalid="ignore"):  # a single micro-batch gives NaN, replaced below
            both = ((weights**2 * single).sum(0) - squared * whole) / (1 - squared)
        return task_variance, np.where(self.count < 2, 0.0, np.maximum(both, 0.0))


def ratio_variance(
    correction: Array, sums: Array, squares: Array, cross: Array, tokens: Array, tokens_squared: Array
) -> Array:
    """Return the variance of sum a_b about R N_b; ``correction`` is k / (k - 1) for k micro-batches."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = sums / tokens
        residual = squares - 2 * ratio * cross + ratio**2 * tokens_squared
        return np.asarray(correction * np.maximum(residual, 0))


def read_arrays(
    state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, Any]
) -> dict[str, NDArray[Any]]:
    """Return a state's arrays by name, float64 unless ``dtypes`` says otherwise.

    Raises
    ------
    ValueError
        If an array has another shape than in ``shapes``.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for name, shape in shapes.items():
        arrays[name] = np.array(state[name], dtype=dtypes.get(name, np.float64))
        if arrays[name].shape != shape:
            raise ValueError(f"state {name!r} must have shape {shape}; got {arrays[name].shape}")
    return arrays
