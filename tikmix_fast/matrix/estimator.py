"""From inner products of micro-batches to the influence matrix and its standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.matrix.microbatch_record import Array, MicrobatchRecord
from tikmix_fast.matrix.query_round import QueryRound, ratio_variance, read_arrays
from tikmix_fast.matrix.task_side import TaskSide

__all__ = ["Estimator"]


# Sums over micro-batches, beside their number and the powers of their weights. Multiplying the weights by a factor
# multiplies each sum by this power of it.
_SUMS = {"tokens": 1, "sum": 1, "tokens_squared": 2, "squares": 2, "cross": 2}
# A domain counts as never measured once its micro-batches weigh less than this in total: the fourth powers of smaller
# weights would underflow to zero.
_NEGLIGIBLE = 1e-30


class Estimator:
    """Estimate S and its standard error from running sums over micro-batches.

    Micro-batch b has N_b target tokens of domain j; let a_b = N_b <q_i, mean gradient>. The estimate is the ratio
    R = sum a_b / sum N_b. The variance of its domain side over k micro-batches is
    k / (k - 1) sum (a_b - R N_b)^2 / (sum N_b)^2.

    The task side has an error of its own. Each task's batches are dealt into splits, and each split has its own query.
    Within a round (between two refreshes) the spread of R over the splits gives the variance of their weighted mean.
    Micro-batches of different rounds also differ by the noise of their rounds' queries; the domain side's variance
    excludes that part. With one micro-batch per round, the variance of both sides together is the spread over rounds.

    Influence is bilinear, so each of the two variances also holds the product of both sides' noise. The product follows
    from how much noisier the single splits are than their mean, and is counted once.

    `forget` lowers the weight of all earlier micro-batches. Every sum above then becomes a weighted sum. Let f be the
    weight of a micro-batch and Fp = sum f^p. The factor (k - 1) / k becomes 1 - 2 F3 / (F1 F2) + F2 / F1^2, and the
    degrees of freedom become F2^2 / F4 - 1.

    A round in which a task had a single split does not tell its variance. The estimator assumes the same variance, for
    the same tokens, as in the rounds that do.

    A bounded `MicrobatchRecord` keeps single micro-batches for bootstrap intervals, split halves and heavy tails.

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
        # Sums of f, f^2, f^3 and f^4 over micro-batches.
        self._weights = np.zeros((4, m))
        self._tokens, self._tokens_squared = np.zeros(m), np.zeros(m)
        self._sum, self._squares, self._cross = np.zeros((n, m)), np.zeros((n, m)), np.zeros((n, m))
        self._closed = TaskSide.empty(n, m)
        self._record = MicrobatchRecord(n, m)
        self._round: QueryRound | None = None
        self._interrupted = False  # the open round was loaded and waits for its queries

    @property
    def in_round(self) -> bool:
        """Whether a round is open."""
        return self._round is not None

    def begin_round(self, owners: Sequence[int], weights: Sequence[float]) -> None:
        """Start a round of frozen queries: query q belongs to task ``owners[q]`` and has weight ``weights[q]`` in it.

        A loaded round continues if these are its queries.

        Raises
        ------
        ValueError
            If a loaded round has other queries.
        """
        if self._round is not None and self._interrupted:
            if not self._round.has_queries(owners, weights):
                raise ValueError(
                    "the tasks must be measured on the same batches as before the interruption; their target tokens "
                    "differ. To measure other batches, call engine.refresh() first"
                )
            self._interrupted = False
            return
        self.end_round()
        self._round = QueryRound(owners, weights, self.n, self.m)

    def end_round(self) -> None:
        """Close the round: keep its task-side variance, drop its queries."""
        self._closed = self._task_side()
        self._round, self._interrupted = None, False

    def forget(self, factor: float) -> None:
        """Multiply the weight of all micro-batches so far, and close the round.

        Parameters
        ----------
        factor : float
            In [0, 1]. With exp(-age / time constant) at every measured step, S is averaged with that time constant.

        Raises
        ------
        ValueError
            If ``factor`` is out of range.
        """
        if not 0.0 <= factor <= 1.0:
            raise ValueError(f"factor must lie between 0 and 1; got {factor!r}")
        self.end_round()
        if factor == 0.0:
            self.reset()
            return
        self._weights *= factor ** np.arange(1.0, 5.0)[:, None]
        for name, power in _SUMS.items():
            setattr(self, f"_{name}", getattr(self, f"_{name}") * factor**power)
        self._closed = self._closed.faded(factor)
        self._record.forget(factor)
        negligible = (self._weights[0] > 0) & (self._weights[0] < _NEGLIGIBLE)
        if negligible.any():
            for name in ("microbatches", "weights", *_SUMS):
                getattr(self, f"_{name}")[..., negligible] = 0
            self._closed = self._closed.without(negligible)
            self._record.clear(negligible)

    def open_round(self) -> tuple[Array, Array]:
        """Return the open round's sum of a_b [n, m] and its target tokens [m]; zeros if no round is open."""
        if self._round is None:
            return np.zeros((self.n, self.m)), np.zeros(self.m)
        return self._round.combine(self._round.sum), self._round.tokens.copy()

    def add(self, products: Array, tokens: Array) -> None:
        """Add one micro-batch.

        Parameters
        ----------
        products : float64 [q, m]
            <query, sum over the domain's target tokens of the gradient of their loss>.
        tokens : float64 [m]
            Target tokens of each domain.
        """
        if self._round is None:
            raise RuntimeError("no queries: begin a round first")
        combined = self._round.add(products, tokens)
        shares, first = self._round.first_half(products)
        self._record.add(combined, tokens, first, shares[:, None] * tokens)
        self._microbatches += tokens > 0
        self._weights += tokens > 0
        self._tokens += tokens
        self._tokens_squared += tokens**2
        self._sum += combined
        self._squares += combined**2
        self._cross += combined * tokens

    def matrix(
        self,
        tasks: Sequence[str],
        domains: Sequence[str],
        dropped: int = 0,
        settings: Mapping[str, Any] | None = None,
        projection_variance: Array | None = None,
    ) -> InfluenceMatrix:
        """Return the matrix of all micro-batches so far.

        ``projection_variance`` [n, m], in units of sum a_b, is the variance that measuring through projections adds.
        """
        side = self._task_side().extrapolated()
        few = self._microbatches < 2
        with np.errstate(divide="ignore", invalid="ignore"):
            retention = _retention(self._weights)
            values = np.where(self._tokens > 0, self._sum / self._tokens, np.nan)
            spread = ratio_variance(
                1 / retention, self._sum, self._squares, self._cross, self._tokens, self._tokens_squared
            )
            # The mean over all rounds has absorbed a part of the noise that micro-batches share with their round.
            round_retention = np.where(side.rounds[0] > 0, _retention(side.rounds), 0.0)
            between = np.where(side.between > 0, np.nan_to_num(round_retention) / retention * side.between, 0.0)
            domain_variance = np.where(few, np.nan, np.maximum(spread - between, 0.0)) / self._tokens**2
            task_variance = side.task_variance / self._tokens**2
            shared = np.clip(side.both / self._tokens**2, 0, np.minimum(domain_variance, task_variance))
            # Do not sum the two parts: the domain part is clipped at zero, which biases the sum upward.
            beyond = np.maximum(side.task_variance - between, 0.0)
            total = np.where(few, np.nan, spread + beyond) / self._tokens**2 - shared
            # The projection's part gets unlimited degrees of freedom: it averages dim x dim products per layer.
            of_projection = None if projection_variance is None else projection_variance / self._tokens**2
            total = total if of_projection is None else total + of_projection
            # Of the task side's variance, ``between`` already shows in ``spread``. Only the remainder rests on the
            # splits' few degrees of freedom.
            rest = np.clip(1 - np.where(between > 0, between / side.task_variance, 0.0), 0, 1)
            degrees = _effective_count(self._weights[1], self._weights[3]) - 1
            squares = np.where(few, np.nan, spread) ** 2 / degrees + rest**2 * side.task_spread
            dof = np.where(total == 0, np.inf, total**2 * self._tokens**4 / squares)
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
            stderr_projection=None if of_projection is None else np.sqrt(of_projection),
            effective_microbatches=_effective_count(self._tokens, self._tokens_squared),
            record=self._record.copy(),
        )

    def state_dict(self, *, within_round: bool = False) -> dict[str, Any]:
        """Return the sums as plain JSON types. They close the open round, unless ``within_round`` keeps it open."""
        going_on = self._round if within_round else None
        side = self._task_side() if going_on is None else self._closed
        return {
            **{name: getattr(self, f"_{name}").tolist() for name in ("microbatches", "weights", *_SUMS)},
            **{name: each.tolist() for name, each in side._asdict().items()},
            "record": self._record.to_dict(),
            **({} if going_on is None else {"round": going_on.state_dict()}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the sums by those of `state_dict`; nothing changes if they do not fit.

        Raises
        ------
        ValueError
            If a sum is missing or has the wrong shape.
        """
        own = {name: getattr(self, f"_{name}").shape for name in ("microbatches", "weights", *_SUMS)}
        side = {name: each.shape for name, each in self._closed._asdict().items()}
        names = {*own, *side, "record"}
        if not isinstance(state, Mapping) or set(state) - {"round"} != names:
            raise ValueError(f"state 'estimator' must be a mapping with {', '.join(sorted(names))}")
        arrays = read_arrays(state, own | side, {"microbatches": np.int64})
        open_round = QueryRound.from_state(state["round"], self.n, self.m) if "round" in state else None
        self._record = MicrobatchRecord.from_dict(state["record"], self.n, self.m)
        for name in own:
            setattr(self, f"_{name}", arrays[name])
        self._closed = TaskSide(**{name: arrays[name] for name in side})
        self._round, self._interrupted = open_round, open_round is not None

    def _task_side(self) -> TaskSide:
        """Return the task side of the closed rounds and of the open one."""
        return self._closed if self._round is None else self._closed.with_round(self._round)


def _retention(weights: Array) -> Array:
    """Return the share of the variance in deviations from the weighted mean; NaN if nearly all weight is on one.

    ``weights`` starts with the sums of the first, second and third powers of the weights.
    """
    first, second, third = weights[:3]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = 1 - 2 * third / (first * second) + second / first**2
    return np.asarray(np.where(share > 1e-9, share, np.nan))


def _effective_count(sums: Array, squares: Array) -> Array:
    """Return how many equal weights have the same information (Kish 1965); 0 where there are none."""
    return np.asarray(sums**2 / np.where(squares > 0, squares, 1.0))
