"""What an influence matrix tells from the record of its micro-batches: other intervals, agreement, heavy tails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
    from tikmix_fast.matrix.microbatch_record import MicrobatchRecord

__all__ = ["SplitHalf", "Tails", "bootstrap_interval", "heavy_tails", "split_half"]

Array = NDArray[np.float64]

_FEWEST_TO_RESAMPLE = 8
_FEWEST_TO_WINSORISE = 5
_FALSE_ALARMS = 0.05


@dataclass(frozen=True, eq=False)
class SplitHalf:
    """How far two halves of one measurement agree on the order of the domains.

    Attributes
    ----------
    half : float64 [n]
        Spearman correlation over domains between two halves that share neither micro-batches nor task batches, mean
        over random halvings. NaN for a task without two splits, and for fewer than three domains.
    whole : float64 [n]
        What that predicts for two whole measurements: 2 r / (1 + r) (Spearman and Brown).
    """

    half: Array
    whole: Array


@dataclass(frozen=True, eq=False)
class Tails:
    """Whether single micro-batches decide a cell.

    Attributes
    ----------
    largest_share : float64 [n, m]
        Share of the largest micro-batch in the spread of the cell (its studentised residual, squared). NaN below three
        micro-batches.
    heavy : bool [n, m]
        Whether that is more than normal noise would give: one false alarm in 20 matrices, whatever their size, if the
        noise of a micro-batch falls with its tokens; some more where small ones are no noisier than large ones.
    winsorised : float64 [n, m]
        The value with a tenth of the micro-batches on either side (at least one) moved in to the next one. NaN below
        five.
    message : str
        A warning with the worst cells, empty if there are none.
    """

    largest_share: Array
    heavy: NDArray[np.bool_]
    winsorised: Array
    message: str


def bootstrap_interval(matrix: InfluenceMatrix, level: float, resamples: int, seed: int) -> tuple[Array, Array]:
    """Return a confidence interval [n, m] whose two sides may differ, for scores that are skewed.

    The domain side is resampled in blocks of consecutive micro-batches and studentised (Efron and Tibshirani 1993,
    chapter 12). The other parts of the error have too few replicates to be resampled: either end of the t interval
    keeps them, and has the domain side's standard error times the bootstrap's quantile over Student's. A domain with
    fewer than eight blocks gets the t interval.
    """
    record = required_record(matrix)
    from scipy.special import stdtrit

    low, high = matrix.interval(level)
    quantile = stdtrit(matrix.dof, 0.5 + level / 2)
    for j in range(record.m):
        tokens, sums = record.of_domain(j)
        count = len(tokens)
        if count < _FEWEST_TO_RESAMPLE:
            continue
        random = np.random.default_rng([seed, j])
        drawn = random.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
        value = sums.sum(1) / tokens.sum()
        residual = sums - value[:, None] * tokens  # [n, k], sums to zero
        error = np.sqrt(count / (count - 1) * (residual**2).sum(1)) / tokens.sum()
        drawn_tokens = drawn @ tokens
        moved = drawn @ residual.T / drawn_tokens[:, None]  # [resamples, n]
        squares = drawn @ (residual**2).T - 2 * moved * (drawn @ (residual * tokens).T)
        squares += moved**2 * (drawn @ tokens**2)[:, None]
        errors = np.sqrt(count / (count - 1) * np.maximum(squares, 0)) / drawn_tokens[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            studentised = np.where(moved == 0, 0.0, moved / errors)
        # Not interpolated: between two that are infinite it gives NaN.
        below, above = np.quantile(studentised, [0.5 - level / 2, 0.5 + level / 2], axis=0, method="nearest")
        expected = stdtrit(count - 1, 0.5 + level / 2)
        down, up = (np.where(error == 0, 0.0, each * error) / expected for each in (above, -below))
        # Where every micro-batch has queries of its own, the tasks' part is in the spread of the blocks already.
        rest = np.sqrt(np.maximum(matrix.stderr[:, j] ** 2 - error**2, 0.0))
        low[:, j] = matrix.values[:, j] - quantile[:, j] * np.hypot(down, rest)
        high[:, j] = matrix.values[:, j] + quantile[:, j] * np.hypot(up, rest)
    return low, high


def split_half(matrix: InfluenceMatrix, draws: int, seed: int) -> SplitHalf:
    """Return the agreement of halves that share neither the domains' micro-batches nor the tasks' own."""
    record = required_record(matrix)
    from scipy.stats import rankdata

    random = np.random.default_rng(seed)
    n = record.n
    domains = [j for j in range(record.m) if len(record.of_domain(j)[0]) >= 2]
    halves = np.empty((draws, 2, n, len(domains)))
    for column, j in enumerate(domains):
        (sums, tokens), (other_sums, other_tokens) = record.halves_of_domain(j)
        count = sums.shape[1]
        first = random.random((draws, count)).argsort(axis=1) < random.integers(count, count + 2, (draws, 1)) // 2
        for half, chosen, of_sums, of_tokens in (
            (0, first, sums, tokens),
            (1, ~first, other_sums, other_tokens),
        ):
            measured = chosen @ of_tokens.T
            known = of_tokens.sum(1) > 1e-9 * (tokens + other_tokens).sum(1)  # a single split has no other half
            halves[:, half, :, column] = np.where(known, chosen @ of_sums.T / np.where(known, measured, 1.0), np.nan)
    unknown = np.isnan(halves).any(axis=(0, 1, 3)) if len(domains) >= 3 else np.ones(n, dtype=np.bool_)
    of_half = np.full(n, np.nan)
    for i in np.flatnonzero(~unknown):
        ranks = rankdata(halves[:, :, i], axis=-1)
        ranks -= ranks.mean(axis=-1, keepdims=True)
        spread = np.sqrt((ranks**2).sum(-1).prod(-1))
        of_half[i] = ((ranks[:, 0] * ranks[:, 1]).sum(-1) / np.where(spread > 0, spread, 1.0)).mean()
    with np.errstate(divide="ignore"):
        return SplitHalf(half=of_half, whole=np.maximum(2 * of_half / (1 + of_half), -1.0))


def heavy_tails(matrix: InfluenceMatrix) -> Tails:
    """Look for micro-batches that decide a cell by themselves.

    With N_b tokens and noise of variance proportional to 1 / N_b, the squared studentised residual of a micro-batch
    over their sum has a Beta distribution under normal noise, whatever the N_b; its largest is held against that with
    Bonferroni's correction over micro-batches and cells (Grubbs 1969, for unequal weights).
    """
    record = required_record(matrix)
    from scipy.special import betainc

    share, winsorised = np.full(matrix.shape, np.nan), np.full(matrix.shape, np.nan)
    heavy = np.zeros(matrix.shape, dtype=np.bool_)
    for j in range(record.m):
        tokens, sums = record.of_domain(j)
        count = len(tokens)
        if count < 3:
            continue
        root = np.sqrt(record.variances_of_domain(j))
        value = sums.sum(1) / tokens.sum()
        residual = (sums - value[:, None] * tokens) / root
        total = (residual**2).sum(1)
        largest = (residual**2 / (1 - tokens / tokens.sum())).max(1)
        share[:, j] = np.clip(np.divide(largest, total, out=np.zeros_like(total), where=total > 0), 0, 1)
        chance = count * betainc((count - 2) / 2, 0.5, 1 - share[:, j])
        heavy[:, j] = chance < _FALSE_ALARMS / heavy.size
        if count >= _FEWEST_TO_WINSORISE:
            cut = max(1, count // 10)
            ordered = np.sort(residual, axis=1)
            inside = np.clip(residual, ordered[:, cut, None], ordered[:, -1 - cut, None])
            winsorised[:, j] = value + (inside @ root) / tokens.sum()
    return Tails(share, heavy, winsorised, _tail_message(matrix, share, heavy, winsorised))


def required_record(matrix: InfluenceMatrix) -> MicrobatchRecord:
    """Return the matrix's record, or raise ValueError if it has none."""
    if matrix.record is None:
        raise ValueError(
            "the matrix has no record of its micro-batches: it was made from plain values or by an older version; "
            "measure it with an InfluenceEngine"
        )
    return matrix.record


def _tail_message(matrix: InfluenceMatrix, share: Array, heavy: NDArray[np.bool_], winsorised: Array) -> str:
    worst = sorted(np.argwhere(heavy).tolist(), key=lambda cell: -share[cell[0], cell[1]])
    if not worst:
        return ""
    cells = []
    for i, j in worst[:3]:
        beside = "" if np.isnan(winsorised[i, j]) else f", winsorised {winsorised[i, j]:.3g}"
        cells.append(
            f"{matrix.tasks[i]} x {matrix.domains[j]}: one micro-batch makes {share[i, j]:.0%} of the spread "
            f"(value {matrix.values[i, j]:.3g}{beside})"
        )
    more = f"; and {len(worst) - 3} more" if len(worst) > 3 else ""
    return (
        f"heavy tails: {len(worst)} of {heavy.size} cells hang on single micro-batches: "
        f"{'; '.join(cells)}{more}. More micro-batches, or a look at the data, tells which value is right"
    )
