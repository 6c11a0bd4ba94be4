"""Whether two measurements put the domains in the same order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tikmix_fast.matrix.rank_correlation import rank_correlation
from tikmix_fast.mixture.inputs import Array

__all__ = ["RankAgreement", "rank_agreement"]

_FEWEST = 3


@dataclass(frozen=True)
class RankAgreement:
    """How well two measurements agree on the order of the domains, task by task.

    Attributes
    ----------
    tasks : tuple of str
        The tasks in both measurements.
    spearman, kendall : tuple of float [n]
        Rank correlations over the domains in both measurements, with ties (tau-b). NaN for fewer than three domains,
        and where all are equal.
    ceiling : tuple of float [n]
        The expected Spearman correlation if only noise has changed: the root of the product of both reliabilities (see
        `SplitHalf.whole`). NaN where a reliability is unknown.
    """

    tasks: tuple[str, ...]
    spearman: tuple[float, ...]
    kendall: tuple[float, ...]
    ceiling: tuple[float, ...]

    @property
    def mean_spearman(self) -> float:
        """Mean of `spearman` over the tasks where it is known; NaN if there is none."""
        return _mean(self.spearman)

    @property
    def mean_kendall(self) -> float:
        """Mean of `kendall` over the tasks where it is known; NaN if there is none."""
        return _mean(self.kendall)

    @property
    def mean_ceiling(self) -> float:
        """Mean of `ceiling` over the tasks where it is known; NaN if there is none."""
        return _mean(self.ceiling)


def rank_agreement(
    tasks: Sequence[str], before: Array, after: Array, reliability_before: Array, reliability_after: Array
) -> RankAgreement:
    """Compare two measurements [n, m] of the same tasks and domains, with NaN for unmeasured domains.

    A reliability [n] is the predicted correlation of two measurements of the same truth; NaN where unknown.
    """
    from scipy.stats import kendalltau

    both = ~(np.isnan(before) | np.isnan(after))
    spearman, kendall = [], []
    for known, old, new in zip(both, before, after, strict=True):
        old, new = old[known], new[known]
        comparable = known.sum() >= _FEWEST and np.ptp(old) > 0 and np.ptp(new) > 0
        spearman.append(float(rank_correlation(old, new)) if comparable else math.nan)
        kendall.append(float(kendalltau(old, new).statistic) if comparable else math.nan)
    ceiling = np.sqrt(np.maximum(reliability_before, 0.0) * np.maximum(reliability_after, 0.0))
    return RankAgreement(tuple(tasks), tuple(spearman), tuple(kendall), tuple(ceiling.tolist()))


def _mean(numbers: Sequence[float]) -> float:
    known = [number for number in numbers if not math.isnan(number)]
    return sum(known) / len(known) if known else math.nan
