"""Detect cells of the influence matrix that single micro-batches decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tikmix_fast.matrix.microbatch_record import Array, MicrobatchRecord

__all__ = ["Tails", "heavy_tails"]


_FEWEST_TO_WINSORISE = 5
_FALSE_ALARMS = 0.05


@dataclass(frozen=True, eq=False)
class Tails:
    """Whether single micro-batches decide a cell.

    Attributes
    ----------
    largest_share : float64 [n, m]
        Share of the largest micro-batch in the spread of the cell (its studentised residual, squared). NaN below three
        micro-batches.
    heavy : bool [n, m]
        Whether normal noise would rarely give such a share. The rate of false alarms is one in 20 matrices of any size,
        if the noise of a micro-batch falls with its tokens; it is higher if small micro-batches are no noisier than
        large ones.
    winsorised : float64 [n, m]
        The value after the most extreme tenth of the micro-batches on either side (at least one) is moved in to the
        next one. NaN below five micro-batches.
    message : str
        A warning with the worst cells, empty if there are none.
    """

    largest_share: Array
    heavy: NDArray[np.bool_]
    winsorised: Array
    message: str


def heavy_tails(values: Array, record: MicrobatchRecord, tasks: Sequence[str], domains: Sequence[str]) -> Tails:
    """Find the cells of ``values`` [n, m] that hang on single micro-batches.

    Let the noise of a micro-batch with N_b tokens have a variance proportional to 1 / N_b. Under normal noise its
    squared studentised residual, over the sum of all, has a Beta distribution whatever the N_b. The largest is tested
    against that distribution, with Bonferroni's correction over micro-batches and cells (Grubbs 1969, for unequal
    weights).
    """
    from scipy.special import betainc

    share, winsorised = np.full(values.shape, np.nan), np.full(values.shape, np.nan)
    heavy = np.zeros(values.shape, dtype=np.bool_)
    for j in range(record.m):
        tokens, sums = record.of_domain(j)
        count = len(tokens)
        if count < 3:
            continue
        root = np.sqrt(record.variances_of_domain(j))
        mean = sums.sum(1) / tokens.sum()
        residual = (sums - mean[:, None] * tokens) / root
        total = (residual**2).sum(1)
        largest = (residual**2 / (1 - tokens / tokens.sum())).max(1)
        share[:, j] = np.clip(np.divide(largest, total, out=np.zeros_like(total), where=total > 0), 0, 1)
        chance = count * betainc((count - 2) / 2, 0.5, 1 - share[:, j])
        heavy[:, j] = chance < _FALSE_ALARMS / heavy.size
        if count >= _FEWEST_TO_WINSORISE:
            cut = max(1, count // 10)
            ordered = np.sort(residual, axis=1)
            inside = np.clip(residual, ordered[:, cut, None], ordered[:, -1 - cut, None])
            winsorised[:, j] = mean + (inside @ root) / tokens.sum()
    worst = sorted(np.argwhere(heavy).tolist(), key=lambda cell: -share[cell[0], cell[1]])
    lines = []
    for i, j in worst[:3]:
        beside = "" if np.isnan(winsorised[i, j]) else f", winsorised {winsorised[i, j]:.3g}"
        lines.append(
            f"{tasks[i]} x {domains[j]}: one micro-batch makes {share[i, j]:.0%} of the spread "
            f"(value {values[i, j]:.3g}{beside})"
        )
    return Tails(share, heavy, winsorised, _message(lines, len(worst), heavy.size))


def _message(lines: Sequence[str], count: int, cells: int) -> str:
    if not count:
        return ""
    more = f"; and {count - len(lines)} more" if count > len(lines) else ""
    return (
        f"heavy tails: {count} of {cells} cells hang on single micro-batches: {'; '.join(lines)}{more}. "
        "Measure more micro-batches, or look at the data, to learn which value is right"
    )
