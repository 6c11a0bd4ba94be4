"""The capped exponential tilt: the mixture problem with an entropy, a linear cost and bounds, in closed form."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tikmix_fast.mixture.inputs import Array

__all__ = ["capped_tilt"]


def capped_tilt(logits: Array, lower: Array, upper: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Minimise ``sum(w * log(w)) - logits @ w`` over ``sum(w) == 1``, ``lower <= w <= upper``.

    The answer is ``clip(exp(logits - nu), lower, upper)`` with the one ``nu`` that makes it sum to 1. Each pass fixes
    the weights that leave their bounds, on the side with the larger total excess, until none does (Bitran and Hax
    1981). This is exact, and usually takes fewer than ten passes.

    Parameters
    ----------
    logits : float64 [m]
        Finite; a constant added to all of them changes nothing.
    lower, upper : float64 [m]
        The caller ensures ``sum(lower) <= 1 <= sum(upper)``.

    Returns
    -------
    weights : float64 [m]
    free : bool [m]
        True where the weight lies strictly between its bounds.

    Examples
    --------
    >>> weights, free = capped_tilt(np.log([6.0, 3.0, 1.0]), np.zeros(3), np.array([0.5, 1.0, 1.0]))
    >>> weights.round(3).tolist(), free.tolist()
    ([0.5, 0.375, 0.125], [False, True, True])
    """
    free = lower < upper
    weights = lower.copy()
    while free.any():
        # Subtract the maximum of this pass: once the largest logits are capped, the rest must not underflow.
        share = np.exp(np.where(free, logits - logits[free].max(), -np.inf))
        trial = share * ((1.0 - weights[~free].sum()) / share.sum())
        low, high = free & (trial < lower), free & (trial > upper)
        excess = (lower - trial)[low].sum() - (trial - upper)[high].sum()
        if excess >= 0:
            weights[low] = lower[low]
            free &= ~low
        if excess <= 0:
            weights[high] = upper[high]
            free &= ~high
        if not (low.any() or high.any()):
            weights[free] = trial[free]
            break
    return weights, free
