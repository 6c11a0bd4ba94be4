"""From inner products of micro-batches to the influence matrix and its standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.matrix.microbatch_record import MicrobatchRecord

__all__ = ["Estimator"]

Array = NDArray[np.float64]


# What forgetting multiplies by its factor, and by its second and fourth power.
_FADING: dict[tuple[str, ...], int] = {
    ("_tokens", "_sum"): 1,
    ("_tokens_squared", "_squares", "_cross", "_task_variance", "_both", "_between", "_task_rounds"): 2,
    ("_task_spread",): 4,
}
# A domain whose micro-batches weigh less than this altogether is as if never measured: powers would become zero first.
_NOTHING = 1e-30


class Estimator:
    """Token-weighted mean over micro-batches with its standard error, kept as sums that can be merged.

    For micro-batch b with N_b target tokens of domain j, let a_b = N_b <q_i, mean gradient>. The estimate is
    R = sum a_b / sum N_b, a ratio estimator; its domain-side variance over k micro-batches is
    k / (k - 1) sum (a_b - R N_b)^2 / (sum N_b)^2.

    The task side has an error of its own. Every task's batches are dealt into splits, each with a query of its own; the
    spread of R over the splits of one round (between refreshes) gives the variance of their weighted mean.
    Micro-batches of several rounds also differ by the noise of their rounds' queries: that is taken out of the domain
    side. So with one micro-batch a round, the variance of both sides together is the spread over rounds.

    Influence is bilinear, so each of the two variances also holds the product of both sides' noise. That part is
    estimated from how much noisier the single splits are than their mean, and counted once.

    `forget` gives what came before a smaller weight. Then every sum above is a weighted one; (k - 1) / k, the part of
    the variance that deviations from their own mean keep, is 1 - 2 F3 / (F1 F2) + F2 / F1^2 with Fp = sum f^p, f being
    the weight of a micro-batch; and degrees of freedom are F2^2 / F4 - 1.

    Of a round in which a task had a single split its variance is not known: it is taken to be as large, by its tokens,
    as in the rounds that tell it.

    Beside the sums a bounded `MicrobatchRecord` is kept, for intervals by resampling, split halves and heavy tails.

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
        # Sums of f, f^2, f^3 and f^4 over micro-batches, f being the weight that forgetting left each of them.
        self._weights = np.zeros((4, m))
        self._tokens, self._tokens_squared = np.zeros(m), np.zeros(m)
        self._sum, self._squares, self._cross = np.zeros((n, m)), np.zeros((n, m)), np.zeros((n, m))
        # Closed rounds, in units of sum a_b: the task side's variance, its square over its degrees of freedom, the part
        # of it that is both sides' noise, and what of it is in the spread of single micro-batches.
        self._task_variance, self._task_spread, self._both = np.zeros((n, m)), np.zeros((n, m)), np.zeros((n, m))
        self._between = np.zeros((n, m))
        self._rounds = np.zeros((3, m))  # sums of f, f^2 and f^3 over rounds
        # Sums of the square of a round's weighted tokens, over all rounds and over those that tell the task's variance.
        self._task_rounds = np.zeros((2, n, m))
        self._record: MicrobatchRecord | None = MicrobatchRecord(n, m)
        self._round: _Round | None = None
        self._interrupted = False  # the round was loaded, and waits for its queries

    @property
    def in_round(self) -> bool:
        """Whether a round is open."""
        return self._round is not None

    def begin_round(self, owners: Sequence[int], weights: Sequence[float]) -> None:
        """Start a round of frozen queries: query q belongs to task ``owners[q]`` and weighs ``weights[q]`` in it.

        A round that was loaded goes on instead, if these are its queries.

        Raises
        ------
        ValueError
            If a round that was loaded had other ones.
        """
        if self._round is not None and self._interrupted:
            if (self._round.owners.tolist(), self._round.weights.tolist()) != (list(owners), list(weights)):
                raise ValueError(
                    "the tasks must be measured on the same batches as before the interruption; their target tokens "
                    "differ. Call engine.refresh() first to measure others"
                )
            self._interrupted = False
            return
        self.end_round()
        self._round = _Round(np.asarray(owners, dtype=np.int64), np.asarray(weights, dtype=np.float64), self.m)

    def end_round(self) -> None:
        """Close the round: its task-side variance is kept, its queries are forgotten."""
        closed = self._task_side()
        self._task_variance, self._task_spread, self._both = closed.variance, closed.spread, closed.both
        self._between, self._rounds, self._task_rounds = closed.between, closed.rounds, closed.task_rounds
        self._round, self._interrupted = None, False

    def forget(self, factor: float) -> None:
        """Multiply the weight of all micro-batches so far, and close the round.

        Parameters
        ----------
        factor : float
            In [0, 1]. With exp(-age / time constant) at every measured step S is averaged with that time constant.

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
        self._weights *= np.array([[factor], [factor**2], [factor**3], [factor**4]])
        self._rounds *= np.array([[factor], [factor**2], [factor**3]])
        for names, power in _FADING.items():
            for name in names:
                setattr(self, name, getattr(self, name) * factor**power)
        if self._record is not None:
            self._record.forget(factor)
        faded = (self._weights[0] > 0) & (self._weights[0] < _NOTHING)
        if faded.any():
            self._drop(faded)

    def _drop(self, domains: NDArray[np.bool_]) -> None:
        """Forget domains altogether, as if never measured."""
        faded = [name for names in _FADING for name in names]
        for name in ("_microbatches", "_weights", "_rounds", *faded):
            getattr(self, name)[..., domains] = 0
        if self._record is not None:
            self._record.clear(domains)

    def open_round(self) -> tuple[Array, Array]:
        """Return the sum of a_b [n, m] and the target tokens [m] of the round that is open; zeros without one."""
        if self._round is None:
            return np.zeros((self.n, self.m)), np.zeros(self.m)
        return self._round.combine(self._round.sum, self.n), self._round.tokens.copy()

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
        combined = self._round.add(products, tokens, self.n)
        if self._record is not None:
            shares, first = self._round.first_half(products, self.n)
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

        ``projection_variance`` [n, m], in units of sum a_b, is what measuring through projections adds.
        """
        task = self._task_side().of_all_rounds()
        with np.errstate(divide="ignore", invalid="ignore"):
            kept = _kept(self._weights)
            values = np.where(self._tokens > 0, self._sum / self._tokens, np.nan)
            spread = _ratio_variance(
                1 / kept, self._sum, self._squares, self._cross, self._tokens, self._tokens_squared
            )
            # Of what micro-batches share with their round, the mean over all rounds has taken out a part too.
            of_rounds = np.where(task.rounds[0] > 0, _kept(task.rounds), 0.0)
            between = np.where(task.between > 0, np.nan_to_num(of_rounds) / kept * task.between, 0.0)
            of_domain = np.maximum(spread - between, 0.0)
            domain_variance = np.where(self._microbatches < 2, np.nan, of_domain) / self._tokens**2
            task_variance = task.variance / self._tokens**2
            shared = np.clip(task.both / self._tokens**2, 0, np.minimum(domain_variance, task_variance))
            # Not of the two parts: where the domain side's was cut off at zero, their sum would be too large.
            beyond = np.maximum(task.variance - between, 0.0)
            total = np.where(self._microbatches < 2, np.nan, spread + beyond) / self._tokens**2 - shared
            # As if known with unlimited degrees of freedom: it is the mean of dim x dim products a layer.
            of_projection = None if projection_variance is None else projection_variance / self._tokens**2
            total = total if of_projection is None else total + of_projection
            # What was taken out comes back with the task side: only the rest of that rests on the splits' few degrees.
            rest = np.clip(1 - np.where(between > 0, between / task.variance, 0.0), 0, 1)
            of_spread = np.where(self._microbatches < 2, np.nan, spread)
            degrees = _effective(self._weights[1], self._weights[3]) - 1
            dof = total**2 * self._tokens**4 / (of_spread**2 / degrees + rest**2 * task.spread)
            dof = np.where(total == 0, np.inf, dof)
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
            effective_microbatches=_effective(self._tokens, self._tokens_squared),
            record=None if self._record is None else self._record.copy(),
        )

    def state_dict(self, *, within_round: bool = False) -> dict[str, Any]:
        """Return the sums as plain JSON types. The open round is closed in them, unless it is to go on."""
        going_on = within_round and self._round is not None
        task = self._closed_task_side() if going_on else self._task_side()
        return {
            "microbatches": self._microbatches.tolist(),
            "weights": self._weights.tolist(),
            "tokens": self._tokens.tolist(),
            "tokens_squared": self._tokens_squared.tolist(),
            "sum": self._sum.tolist(),
            "squares": self._squares.tolist(),
            "cross": self._cross.tolist(),
            "task_variance": task.variance.tolist(),
            "task_spread": task.spread.tolist(),
            "both": task.both.tolist(),
            "between": task.between.tolist(),
            "rounds": task.rounds.tolist(),
            "task_rounds": task.task_rounds.tolist(),
            "record": None if self._record is None else self._record.to_dict(),
            **({"round": self._round.state_dict()} if going_on and self._round is not None else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the sums that `state_dict` gave; nothing changes if they do not fit.

        A state from before there was a record has none, and what is added to it is not recorded either: a record of a
        part would be taken for the whole. A state from before there was forgetting has forgotten nothing; one from
        before third powers were kept has those of equal weights.

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
                ("sum", "squares", "cross", "task_variance", "task_spread", "both", "between"), (self.n, self.m)
            ),
            "weights": (4, self.m),
            "rounds": (3, self.m),
            "task_rounds": (2, self.n, self.m),
        }
        if isinstance(state, Mapping) and {"microbatches", "tokens", "task_known"} <= set(state):
            state = _from_earlier(state, self.n, self.m)
        if not isinstance(state, Mapping) or set(state) - {"record", "round"} != set(shapes):
            raise ValueError(f"state 'estimator' must be a mapping with {', '.join(shapes)}")
        read = _read_arrays(state, shapes, {"microbatches": np.int64})
        record, interrupted = state.get("record"), state.get("round")
        open_round = None if interrupted is None else _Round.from_state(interrupted, self.n, self.m)
        self._record = None if record is None else MicrobatchRecord.from_dict(record, self.n, self.m)
        for name, value in read.items():
            setattr(self, f"_{name}", value)
        self._round, self._interrupted = open_round, open_round is not None

    def _closed_task_side(self) -> _TaskSide:
        return _TaskSide(
            variance=self._task_variance.copy(),
            spread=self._task_spread.copy(),
            both=self._both.copy(),
            between=self._between.copy(),
            rounds=self._rounds.copy(),
            task_rounds=self._task_rounds.copy(),
        )

    def _task_side(self) -> _TaskSide:
        """Return the task side of the closed rounds and of the open one."""
        side = self._closed_task_side()
        if self._round is None or not self._round.tokens.any():
            return side
        measured = self._round.tokens > 0
        side.rounds[:] += measured
        alike = np.where(measured, self._round.tokens_squared / np.where(measured, self._round.tokens, 1.0) ** 2, 0.0)
        for task in range(self.n):
            splits = int((self._round.owners == task).sum())
            side.task_rounds[0, task] += self._round.tokens**2
            if splits < 2:
                continue
            side.task_rounds[1, task] += self._round.tokens**2
            of_round, of_both = self._round.variance(task)
            side.variance[task] += of_round
            side.spread[task] += of_round**2 / (splits - 1)
            side.both[task] += of_both
            side.between[task] += alike * np.maximum(of_round - of_both, 0.0)
        return side


class _TaskSide(NamedTuple):
    """What `Estimator` keeps of the task side, by the names it has there without an underscore."""

    variance: Array
    spread: Array
    both: Array
    between: Array
    rounds: Array
    task_rounds: Array

    def of_all_rounds(self) -> _TaskSide:
        """Return the same with rounds that do not tell a task's variance taken to have that of those that do."""
        measured, known = self.task_rounds
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(measured > known, measured / known, 1.0)
            ratio = np.where(np.isfinite(ratio), ratio, np.nan)
        scaled = {name: getattr(self, name) * ratio for name in ("variance", "both", "between")}
        return self._replace(spread=self.spread * ratio**2, **scaled)


# What a round is kept in a file as: per query, per domain, per query and domain, per task of the round and domain.
_OF_QUERY, _OF_DOMAIN = ("owners", "weights"), ("tokens", "tokens_squared", "count")
_CELLS, _BY_TASK = ("sum", "squares", "cross"), ("task_squares", "task_cross")


class _Round:
    """The sums of one round of frozen queries, split by split."""

    def __init__(self, owners: NDArray[np.int64], weights: Array, m: int) -> None:
        self.owners, self.weights = owners, weights
        self.tokens, self.tokens_squared, self.count = np.zeros(m), np.zeros(m), np.zeros(m)
        queries = len(owners)
        self.sum, self.squares, self.cross = np.zeros((queries, m)), np.zeros((queries, m)), np.zeros((queries, m))
        self.task_squares: dict[int, Array] = {int(task): np.zeros(m) for task in owners}
        self.task_cross: dict[int, Array] = {int(task): np.zeros(m) for task in owners}
        # Every other split of each task, and their share of its tokens.
        order = np.array([(owners[:q] == owners[q]).sum() for q in range(queries)], dtype=np.int64)
        self.first_weights = np.where(order % 2 == 0, self.weights, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        by_task = {name: [each.tolist() for each in getattr(self, name).values()] for name in _BY_TASK}
        return {name: getattr(self, name).tolist() for name in (*_OF_QUERY, *_OF_DOMAIN, *_CELLS)} | by_task

    @classmethod
    def from_state(cls, state: Mapping[str, Any], n: int, m: int) -> _Round:
        """Read what `state_dict` returned for n tasks and m domains.

        Raises
        ------
        ValueError
            If a part is missing, of another shape, or of an unknown task.
        """
        names = {*_OF_QUERY, *_OF_DOMAIN, *_CELLS, *_BY_TASK}
        if not isinstance(state, Mapping) or set(state) != names:
            raise ValueError(f"state 'round' must be a mapping with {', '.join(sorted(names))}")
        queries, tasks = len(state["owners"]), list(dict.fromkeys(state["owners"]))
        if not set(tasks) <= set(range(n)):
            raise ValueError(f"state 'owners' must lie in 0 ... {n - 1}; got {tasks}")
        shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(_OF_QUERY, (queries,)),
            **dict.fromkeys(_OF_DOMAIN, (m,)),
            **dict.fromkeys(_CELLS, (queries, m)),
            **dict.fromkeys(_BY_TASK, (len(tasks), m)),
        }
        read = _read_arrays(state, shapes, {"owners": np.int64})
        found = cls(read["owners"], read["weights"], m)
        for name in (*_OF_DOMAIN, *_CELLS):
            setattr(found, name, read[name])
        for name in _BY_TASK:
            setattr(found, name, dict(zip(tasks, read[name], strict=True)))
        return found

    def first_half(self, products: Array, n: int) -> tuple[Array, Array]:
        """Return what share of each task's tokens its first half of splits is [n], and its part of a micro-batch."""
        share, part = np.zeros(n), np.zeros((n, products.shape[1]))
        np.add.at(share, self.owners, self.first_weights)
        np.add.at(part, self.owners, self.first_weights[:, None] * products)
        return share, part

    def add(self, products: Array, tokens: Array, n: int) -> Array:
        """Take one micro-batch and return it for the tasks' combined queries, [n, m]."""
        combined = self.combine(products, n)
        self.tokens += tokens
        self.tokens_squared += tokens**2
        self.count += tokens > 0
        self.sum += products
        self.squares += products**2
        self.cross += products * tokens
        for task in self.task_squares:
            self.task_squares[task] += combined[task] ** 2
            self.task_cross[task] += combined[task] * tokens
        return combined

    def combine(self, products: Array, n: int) -> Array:
        """Return for the tasks' combined queries [n, m] what is given for each query [q, m]."""
        combined = np.zeros((n, products.shape[1]))
        np.add.at(combined, self.owners, self.weights[:, None] * products)
        return combined

    def variance(self, task: int) -> tuple[Array, Array]:
        """Return the task-side variance [m] of the round's sum a_b, and the part of it that is both sides' noise."""
        mine = self.owners == task
        weights = self.weights[mine][:, None]
        splits = self.sum[mine]
        mean = (weights * splits).sum(0)
        # Unbiased where the variance of a split goes as one over its tokens.
        of_task = (weights * (splits - mean) ** 2).sum(0) / (len(splits) - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            correction = self.count / (self.count - 1)
        single = _ratio_variance(
            correction, splits, self.squares[mine], self.cross[mine], self.tokens, self.tokens_squared
        )
        whole = _ratio_variance(
            correction, mean, self.task_squares[task], self.task_cross[task], self.tokens, self.tokens_squared
        )
        # With V(q) = q' D q the domain side's variance for the query q, and independent noise of covariance C_k in
        # split k: E V(split k) = V(truth) + tr(D C_k) and E V(mean) = V(truth) + sum w_k^2 tr(D C_k). Solve for the
        # latter trace.
        squared = float((weights**2).sum())
        with np.errstate(invalid="ignore"):  # of a single micro-batch nothing is known
            both = ((weights**2 * single).sum(0) - squared * whole) / (1 - squared)
        return of_task, np.where(self.count < 2, 0.0, np.maximum(both, 0.0))


def _ratio_variance(
    correction: Array, sums: Array, squares: Array, cross: Array, tokens: Array, tokens_squared: Array
) -> Array:
    """Return the variance of sum a_b about R N_b over micro-batches, ``correction`` being k / (k - 1) for k of them."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = sums / tokens
        residual = squares - 2 * ratio * cross + ratio**2 * tokens_squared
        return np.asarray(correction * np.maximum(residual, 0))


def _kept(weights: Array) -> Array:
    """Return what part of the variance deviations from the weighted mean keep; NaN if there is as good as one only.

    ``weights`` are the sums of the first three powers of the weights, in this order.
    """
    first, second, third = weights[:3]
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = 1 - 2 * third / (first * second) + second / first**2
    return np.asarray(np.where(kept > 1e-9, kept, np.nan))


def _from_earlier(state: Mapping[str, Any], n: int, m: int) -> dict[str, Any]:
    """Return a state of an earlier version in the form of today's."""
    count, known = np.array(state["microbatches"], dtype=np.float64), np.array(state["task_known"], dtype=np.bool_)
    tokens_squared = np.broadcast_to(np.array(state["tokens"], dtype=np.float64) ** 2, (n, m))
    weights = np.array(state.get("weights", [count] * 3), dtype=np.float64)
    rounds = np.array(state.get("rounds", np.zeros((2, m))), dtype=np.float64)
    if weights.shape != (3, m) or rounds.shape != (2, m) or known.shape != (n, m) or count.shape != (m,):
        raise ValueError(f"state 'estimator' must be of {n} tasks and {m} domains")

    def with_third(sums: Array) -> Array:
        third = sums[1] ** 2 / np.where(sums[0] > 0, sums[0], 1.0)
        return np.stack([*sums[:2], third, *sums[2:]])

    return {
        "between": np.zeros((n, m)),
        **{name: value for name, value in state.items() if name != "task_known"},
        "weights": with_third(weights),
        "rounds": with_third(rounds),
        "task_rounds": np.stack([tokens_squared, np.where(known, tokens_squared, 0.0)]),
    }


def _read_arrays(
    state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, Any] | None = None
) -> dict[str, NDArray[Any]]:
    read: dict[str, NDArray[Any]] = {}
    for name, shape in shapes.items():
        read[name] = np.array(state[name], dtype=(kinds or {}).get(name, np.float64))
        if read[name].shape != shape:
            raise ValueError(f"state {name!r} must have shape {shape}; got {read[name].shape}")
    return read


def _effective(sums: Array, squares: Array) -> Array:
    """Return how many equally large ones would tell as much (Kish 1965); 0 where there is none."""
    return np.asarray(sums**2 / np.where(squares > 0, squares, 1.0))
