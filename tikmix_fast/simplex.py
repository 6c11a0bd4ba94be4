"""Check mixtures: the same words in every room."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["require_mixtures"]


def require_mixtures(name: str, weights: NDArray[np.float64], tolerance: float) -> None:
    """Raise ValueError unless each row of weights [m] or [N, m] is at least 0 and sums to 1 within ``tolerance``."""
    rows = np.atleast_2d(weights)
    with np.errstate(invalid="ignore"):  # of infinities
        sums = rows.sum(axis=1)
    wrong = np.flatnonzero(~((rows >= 0).all(axis=1) & (np.abs(sums - 1.0) <= tolerance)))
    if wrong.size:
        row = int(wrong[0])
        bound = f"{tolerance:g}".replace("e-0", "e-")
        every, which, each = (" in every row", f" row {row} with", "each row") if weights.ndim == 2 else ("", "", "it")
        raise ValueError(
            f"{name} must be at least 0 and sum to 1 within {bound}{every}; got{which} sum {sums[row]:g} and"
            f" least weight {rows[row].min(initial=np.inf):g}; divide {each} by its sum"
        )
