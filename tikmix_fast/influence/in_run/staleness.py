"""How fast queries go stale and influence changes during a run, compared with their noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tikmix_fast.influence.queries.query_sketch import SKETCH_SIZE
from tikmix_fast.matrix.rank_correlation import rank_correlation

__all__ = ["Lag", "Staleness", "StalenessHistory"]

Array = NDArray[np.float64]

_SKETCHES_KEPT = 8
_STEPS_KEPT = 256
_FEWEST_FOR_HINT = 16
_FORMS = ("query_lags", "ceilings", "sketches", "influence")


@dataclass(frozen=True)
class Lag:
    """Mean agreement, over tasks and pairs, of two measured steps that are ``steps`` optimizer steps apart."""

    steps: int
    agreement: float
    pairs: int


@dataclass(frozen=True)
class Staleness:
    """The result of `InRun.staleness`; ``print`` shows it in words.

    Attributes
    ----------
    queries : tuple of Lag
        Cosine of the tasks' queries (preconditioned gradients), noise included.
    query_ceiling : float
        The cosine at lag 0: noise of the task passes alone, estimated from the splits of each step.
    influence : tuple of Lag
        Spearman correlation over domains between two averages of S, each over ``window`` measured steps.
    influence_ceiling : float
        The correlation if noise were the only difference, estimated from every other step of each window
        (Spearman-Brown).
    window : int
        Measured steps in one average.
    time_constant : float or None
        Time constant of the exponential average that follows S best, in optimizer steps, estimated from the covariance
        of measured steps by their distance. Infinite: the longest is the best. None: too few steps.
    """

    queries: tuple[Lag, ...]
    query_ceiling: float
    influence: tuple[Lag, ...]
    influence_ceiling: float
    window: int
    time_constant: float | None

    def __str__(self) -> str:
        lines = [
            f"task gradients {_steps(lag.steps)} apart: cosine {lag.agreement:.2f} (noise ceiling "
            f"{self.query_ceiling:.2f}; {lag.pairs} pairs)"
            for lag in self.queries
        ]
        lines += [
            f"S averaged over {self.window} measured steps, {_steps(lag.steps)} apart: rank agreement "
            f"{lag.agreement:.2f} (noise ceiling {self.influence_ceiling:.2f}; {lag.pairs} pairs)"
            for lag in self.influence
        ]
        if self.time_constant is None:
            lines.append("too few measured steps yet to advise a time constant")
        elif math.isinf(self.time_constant):
            lines.append("time constant: the longest; S moved less than its noise, as far as this run can tell")
        else:
            lines.append(f"time constant: about {_steps(round(self.time_constant))}")
        return "\n".join(lines)


class StalenessHistory:
    """Compare each measured step with earlier ones: sketches with the last 8, influence with the last 256.

    Parameters
    ----------
    n : int
        Number of tasks.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._query_lags: dict[int, tuple[int, float]] = {}  # pairs, and the sum of their cosines
        self._ceilings = (0, 0.0)  # steps, and the sum of their signal shares
        self._sketches: list[tuple[int, Array]] = []
        self._influence: list[tuple[int, Array, Array]] = []

    def add(self, step: int, whole: Array, signal: Array, sums: Array, tokens: Array) -> None:
        """Add a measured step.

        Parameters
        ----------
        step : int
        whole, signal : float64 [n, 1021], [n]
            The result of `QuerySketch.by_task`.
        sums, tokens : float64 [n, m], [m]
            Tokens times influence, and target tokens.
        """
        lengths = np.linalg.norm(whole, axis=1, keepdims=True)
        whole = np.divide(whole, lengths, out=np.zeros_like(whole), where=lengths > 0)
        for earlier, other in self._sketches:
            pairs, total = self._query_lags.get(step - earlier, (0, 0.0))
            self._query_lags[step - earlier] = pairs + 1, total + float((whole * other).sum(1).mean())
        if not np.isnan(signal).all():
            self._ceilings = self._ceilings[0] + 1, self._ceilings[1] + float(np.nanmean(signal))
        self._sketches = [*self._sketches, (step, whole)][-_SKETCHES_KEPT:]
        self._influence = [*self._influence, (step, sums, tokens)][-_STEPS_KEPT:]

    def report(self, every: int) -> Staleness:
        """Return the report so far, for a step measured every ``every`` optimizer steps."""
        lags = sorted(self._query_lags.items())
        # Leave out the odd lags between a near step and a later regular one.
        scheduled = [(lag, sums) for lag, sums in lags if lag < every or lag % every == 0] or lags
        steps, total = self._ceilings
        window = max(4, len(self._influence) // 8)
        influence, influence_ceiling = self._of_windows(window)
        return Staleness(
            queries=tuple(Lag(lag, total / pairs, pairs) for lag, (pairs, total) in scheduled),
            query_ceiling=max(total / steps, 0.0) if steps else float("nan"),
            influence=influence,
            influence_ceiling=influence_ceiling,
            window=window,
            time_constant=self._hint(every),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "query_lags": [[lag, *sums] for lag, sums in self._query_lags.items()],
            "ceilings": list(self._ceilings),
            "sketches": [[step, whole.tolist()] for step, whole in self._sketches],
            "influence": [[step, sums.tolist(), tokens.tolist()] for step, sums, tokens in self._influence],
        }

    @classmethod
    def from_dict(cls, content: Any, n: int) -> StalenessHistory:
        """Return a history of n tasks from the content of `to_dict`.

        Raises
        ------
        ValueError
            If a part is missing or has the wrong shape.
        """
        if not isinstance(content, Mapping) or set(content) != set(_FORMS):
            raise ValueError(f"state 'staleness' must be a mapping with {', '.join(_FORMS)}")
        history = cls(n)
        history._query_lags = {int(lag): (int(pairs), float(total)) for lag, pairs, total in content["query_lags"]}
        steps, total = content["ceilings"]
        history._ceilings = int(steps), float(total)
        history._sketches = [(int(step), np.array(whole)) for step, whole in content["sketches"]]
        history._influence = [(int(step), np.array(a), np.array(t)) for step, a, t in content["influence"]]
        if any(whole.shape != (n, SKETCH_SIZE) for _, whole in history._sketches) or any(
            sums.shape != (n, *tokens.shape) for _, sums, tokens in history._influence
        ):
            raise ValueError(f"state 'staleness' must be of {n} tasks")
        return history

    def _of_windows(self, window: int) -> tuple[tuple[Lag, ...], float]:
        """Return the rank agreement of windows by lag, and its noise ceiling."""
        starts = range(0, len(self._influence) - window + 1, window)
        windows = [self._influence[start : start + window] for start in starts]
        if len(windows) < 2:
            return (), float("nan")
        middles = [float(np.mean([step for step, _, _ in each])) for each in windows]
        means = [_mean(each) for each in windows]
        apart: dict[int, list[float]] = {}
        for i, first in enumerate(means):
            for j in range(i):
                apart.setdefault(i - j, []).append(_rank_agreement(first, means[j]))
        gap = (middles[-1] - middles[0]) / (len(windows) - 1)
        half = float(np.nanmean([_rank_agreement(_mean(each[::2]), _mean(each[1::2])) for each in windows]))
        lags = tuple(Lag(round(gap * many), float(np.nanmean(each)), len(each)) for many, each in apart.items())
        # With too few measured steps the ceiling is unknown (NaN), not zero.
        return lags, half if np.isnan(half) else max(2 * half / (1 + half), 0.0) if half > -1 else 0.0

    def _hint(self, every: int) -> float | None:
        """Return the time constant with the least expected squared error, given the covariances of measured steps."""
        if len(self._influence) < _FEWEST_FOR_HINT:
            return None
        from scipy.optimize import nnls

        steps = np.array([step for step, _, _ in self._influence], dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            each = np.array([sums / tokens for _, sums, tokens in self._influence])  # [t, n, m]
        each -= np.nanmean(each, axis=2, keepdims=True)
        each = np.nan_to_num(each / np.sqrt(np.nanmean(each**2, axis=(0, 2), keepdims=True))).reshape(len(steps), -1)
        covariance = each @ each.T / each.shape[1]
        apart = np.abs(steps[:, None] - steps)
        first, second = np.triu_indices(len(steps), 1)
        observed, lags = covariance[first, second], apart[first, second]
        # Model: the covariance of two steps has one part that fades with their distance, and one that stays.
        fits = []
        for fade in every * 2.0 ** np.arange(12):
            shape = np.stack([np.exp(-lags / fade), np.ones_like(lags)], axis=1)
            parts, residual = nnls(shape, observed)
            fits.append((residual, fade, *parts))
        _, fade, fading, staying = min(fits)
        noise = max(float(np.diag(covariance).mean()) - fading - staying, 0.0)
        ages = float(every) * np.arange(len(steps))

        def error(constant: float) -> float:
            weights = np.exp(-ages / constant)
            weights /= weights.sum()
            between = fading * np.exp(-np.abs(ages[:, None] - ages) / fade)
            now = fading * np.exp(-ages / fade)
            return float(weights @ between @ weights + noise * (weights**2).sum() - 2 * weights @ now)

        choices = [*(every * 2.0 ** np.arange(0, 12, 0.5)), math.inf]
        best = min(choices, key=error)
        return best if best < 2 * ages[-1] else math.inf


def _mean(steps: Sequence[tuple[int, Array, Array]]) -> Array:
    tokens = np.sum([each for _, _, each in steps], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.sum([sums for _, sums, _ in steps], axis=0) / tokens)


def _rank_agreement(first: Array, second: Array) -> float:
    """Return Spearman's correlation over the domains of both, mean over tasks; NaN below three domains."""
    both = ~np.isnan(first).any(0) & ~np.isnan(second).any(0)
    if both.sum() < 3:
        return float("nan")
    # A task without differences between domains agrees with nothing: 0, not NaN.
    return float(np.nan_to_num(rank_correlation(first[:, both], second[:, both], axis=1)).mean())


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"
