"""The steps at which a schedule may change its mixture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from tikmix_fast.arguments import require_int

__all__ = ["equal_boundaries", "read_boundaries"]


def equal_boundaries(steps: int, stages: int) -> tuple[int, ...]:
    """Return the boundaries between equal stages of a run.

    Raises
    ------
    ValueError
        If ``stages`` is no int from 1 to ``steps``.

    Examples
    --------
    >>> equal_boundaries(100, 3)
    (33, 66)
    """
    count = require_int("stages", stages, 1, steps)
    return tuple(stage * steps // count for stage in range(1, count))


def read_boundaries(steps: int, boundaries: Sequence[int]) -> tuple[int, ...]:
    """Return the caller's boundaries.

    Raises
    ------
    ValueError
        If they are no ints, do not rise, or lie outside the run.
    """
    places = tuple(require_int("boundaries", place, 0) for place in boundaries)
    if any(later <= earlier for earlier, later in pairwise(places)) or (places and places[-1] >= steps):
        raise ValueError(f"boundaries must rise and lie below steps, {steps}; got {places}")
    return places
