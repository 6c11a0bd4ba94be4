"""What an influence matrix says, and what to doubt in it, in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tikmix_fast.matrix.influence_matrix import InfluenceMatrix

__all__ = ["list_names", "matrix_warnings", "relative_influence"]

_NOISY = 0.3
_FEW = 8


def list_names(names: Sequence[str], most: int = 5) -> str:
    """Return names in a row; if there are more than ``most``, the first of them and how many more there are.

    Examples
    --------
    >>> list_names(["a", "b"]), list_names(list("abcd"), 2)
    ('a, b', 'a, b and 2 more')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def relative_influence(matrix: InfluenceMatrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return values and standard errors [n, m] as shares of each task's largest magnitude, so that tasks compare."""
    largest = np.nan_to_num(np.abs(matrix.values)).max(axis=1, keepdims=True)
    largest[~(largest > 0)] = 1.0
    return matrix.values / largest, matrix.stderr / largest


def matrix_warnings(matrix: InfluenceMatrix) -> list[str]:
    """Return one sentence for everything that is missing or doubtful."""
    warnings = []
    unmeasured = np.isnan(matrix.values).all(axis=0)
    if unmeasured.any():
        names = list_names([matrix.domains[j] for j in np.flatnonzero(unmeasured)])
        warnings.append(f"Never measured: {names}. A mixture keeps their weights as they were.")
    measured = ~unmeasured
    if measured.any() and np.isnan(matrix.stderr[:, measured]).all():
        warnings.append("There are no error bars: nothing here tells influence from noise.")
    else:
        unknown = np.isnan(matrix.stderr[:, measured]).any(axis=1)
        if unknown.any():
            names = list_names([matrix.tasks[i] for i in np.flatnonzero(unknown)])
            warnings.append(f"Not all errors are known for: {names}. It takes two micro-batches or more on both sides.")
        errors = matrix.relative_error()
        noisy = [
            f"{matrix.tasks[i]} ({min(float(errors[i]) ** 2, 1.0):.0%})"
            for i in np.argsort(-np.nan_to_num(errors))
            if np.isfinite(errors[i]) and errors[i] > _NOISY
        ]
        if noisy:
            warnings.append(
                f"Noise is a large part of what tells domains apart for: {list_names(noisy)}. Measure more tokens."
            )
    few = measured & (matrix.microbatches > 0) & (matrix.microbatches < _FEW)
    if few.any():
        names = list_names([matrix.domains[j] for j in np.flatnonzero(few)])
        warnings.append(f"Fewer than {_FEW} micro-batches, so that error bars are rough: {names}.")
    if matrix.dropped:
        warnings.append(f"{matrix.dropped} micro-batches were dropped because they were not finite.")
    if matrix.settings.get("excluded"):
        names = list_names([str(each) for each in matrix.settings["excluded"]], 3)
        warnings.append(f"Parameters left out, so that their influence counts as zero: {names}.")
    if matrix.record is not None:
        message = matrix.tails().message
        if message:
            warnings.append(message)
    return warnings
