"""Bootstrap intervals and split halves, by resampling recorded micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tikmix_fast.matrix.microbatch_record import Array, MicrobatchRecord
from tikmix_fast.matrix.rank_correlation import rank_correlation

__all__ = ["SplitHalf", "bootstrap_interval", "split_half"]


_FEWEST_BLOCKS = 8


@dataclass(frozen=True, eq=False)
class SplitHalf:
    """How well two halves of one measurement agree on the order of the domains.

    Attributes
    ----------
    half : float64 [n]
        Spearman correlation over domains between two halves that share neither micro-batches nor task batches; the mean
        over random halvings. NaN for a task without two splits, and for fewer than three domains.
    whole : float64 [n]
        The correlation this predicts for two whole measurements: 2 r / (1 + r) (Spearman and Brown).
    """

    half: Array
    whole: Array


def bootstrap_interval(
    values: Array, stderr: Array, dof: Array, record: MicrobatchRecord, level: float, resamples: int, seed: int
) -> tuple[Array, Array]:
    """Return a confidence interval [n, m] whose sides may differ in length, for skewed scores.

    The domain side is resampled in blocks of consecutive micro-batches and studentised (Efron and Tibshirani 1993,
    chapter 12). The other parts of the error have too few replicates to resample, so each end takes them from the t
    interval, and takes the domain side's standard error times the bootstrap's quantile over Student's. A domain with
    fewer than eight blocks gets the t interval.

    Parameters
    ----------
    values, stderr, dof : float64 [n, m]
        See `InfluenceMatrix`.
    record : MicrobatchRecord
        Of the same tasks and domains.
    level : float
        Between 0 and 1.
    resamples, seed : int
    """
    from scipy.special import stdtrit

    quantile = stdtrit(dof, 0.5 + level / 2)
    low, high = values - quantile * stderr, values + quantile * stderr
    for j in range(record.m):
        tokens, sums = record.of_domain(j)
        count = len(tokens)
        if count < _FEWEST_BLOCKS:
            continue
        random = np.random.default_rng([seed, j])
        drawn = random.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
        residual = sums - (sums.sum(1) / tokens.sum())[:, None] * tokens  # [n, k], sums to zero
        error = np.sqrt(count / (count - 1) * (residual**2).sum(1)) / tokens.sum()
        drawn_tokens = drawn @ tokens
        shift = drawn @ residual.T / drawn_tokens[:, None]  # [resamples, n]
        squares = drawn @ (residual**2).T - 2 * shift * (drawn @ (residual * tokens).T)
        squares += shift**2 * (drawn @ tokens**2)[:, None]
        errors = np.sqrt(count / (count - 1) * np.maximum(squares, 0)) / drawn_tokens[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            studentised = np.where(shift == 0, 0.0, shift / errors)
        # Interpolation between two infinite values would give NaN.
        below, above = np.quantile(studentised, [0.5 - level / 2, 0.5 + level / 2], axis=0, method="nearest")
        expected = stdtrit(count - 1, 0.5 + level / 2)
        down, up = (np.where(error == 0, 0.0, each * error) / expected for each in (above, -below))
        # If every micro-batch has its own queries, the spread of the blocks already contains the tasks' part.
        rest = np.sqrt(np.maximum(stderr[:, j] ** 2 - error**2, 0.0))
        low[:, j] = values[:, j] - quantile[:, j] * np.hypot(down, rest)
        high[:, j] = values[:, j] + quantile[:, j] * np.hypot(up, rest)
    return low, high


def split_half(record: MicrobatchRecord, draws: int, seed: int) -> SplitHalf:
    """Return the agreement of halves that share neither the domains' micro-batches nor the tasks' own batches."""
    random = np.random.default_rng(seed)
    n = record.n
    domains = [j for j in range(record.m) if len(record.of_domain(j)[0]) >= 2]
    halves = np.empty((draws, 2, n, len(domains)))
    for column, j in enumerate(domains):
        (sums, tokens), (other_sums, other_tokens) = record.halves_of_domain(j)
        count = sums.shape[1]
        first = random.random((draws, count)).argsort(axis=1) < random.integers(count, count + 2, (draws, 1)) // 2
        # A task with a single split has no tokens in its other half.
        least = 1e-9 * (tokens + other_tokens).sum(1)
        for half, blocks, half_sums, half_tokens in (
            (0, first, sums, tokens),
            (1, ~first, other_sums, other_tokens),
        ):
            known = half_tokens.sum(1) > least
            divisor = np.where(known, blocks @ half_tokens.T, 1.0)
            halves[:, half, :, column] = np.where(known, blocks @ half_sums.T / divisor, np.nan)
    unknown = np.isnan(halves).any(axis=(0, 1, 3)) if len(domains) >= 3 else np.ones(n, dtype=np.bool_)
    agreement = np.full(n, np.nan)
    for i in np.flatnonzero(~unknown):
        # A half in which all domains are equal has no order to agree with.
        agreement[i] = np.nan_to_num(rank_correlation(halves[:, 0, i], halves[:, 1, i])).mean()
    with np.errstate(divide="ignore"):
        return SplitHalf(half=agreement, whole=np.maximum(2 * agreement / (1 + agreement), -1.0))
