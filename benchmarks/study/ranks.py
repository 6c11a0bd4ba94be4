"""Spearman's rank correlation, task by task."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

__all__ = ["spearman_by_task"]


def spearman_by_task(left: Any, right: Any) -> NDArray[np.float64]:
    """Return Spearman's rho over the columns of two arrays [n, m], one per row."""
    return np.array([float(spearmanr(*rows).statistic) for rows in zip(left, right, strict=True)])
