"""Spearman's rank correlation of many pairs at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["rank_correlation"]


def rank_correlation(first: Any, second: Any, axis: int = -1) -> NDArray[np.float64]:
    """Return Spearman's correlation along one axis, with tied values sharing their mean rank.

    ``scipy.stats.spearmanr`` correlates every row with every other; this pairs row with row.

    Parameters
    ----------
    first, second : array_like
        Of one shape.
    axis : int
        The axis to correlate over.

    Returns
    -------
    float64
        The shape without ``axis``; NaN where either side is constant.

    Examples
    --------
    >>> rank_correlation([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], [[2.0, 4.0, 9.0], [3.0, 2.0, 1.0]]).tolist()
    [1.0, -1.0]
    """
    from scipy.stats import rankdata

    ranks = (rankdata(side, axis=axis) for side in (first, second))
    a, b = (side - side.mean(axis=axis, keepdims=True) for side in ranks)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((a * b).sum(axis) / np.sqrt((a**2).sum(axis) * (b**2).sum(axis)))
