"""The steps at which a schedule may change its mixture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from tikmix_fast.arguments import require_int

__all__ = ["read_boundaries"]


def read_boundaries(steps: int, stages: int, boundaries: Sequence[int] | None) -> tuple[int, ...]:
    """Return the caller's boundaries, or those between equal stages; ValueError if they do not rise within the run."""
    if boundaries is None:
        count = require_int("stages", stages, 1, steps)
        return tuple(stage * steps // count for stage in range(1, count))
    places = tuple(require_int("boundaries", place, 0) for place in boundaries)
    if any(later <= earlier for earlier, later in pairwise(places)) or (places and places[-1] >= steps):
        raise ValueError(f"boundaries must rise and lie below steps, {steps}; got {places}")
    return places
