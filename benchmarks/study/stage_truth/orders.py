"""Orders of the data with common random numbers: a shift changes only the sequences that it must."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["DataOrder"]

Ints = NDArray[np.int64]


class DataOrder:
    """One order of the data from a checkpoint on, for the uniform mixture and every shift of it.

    Each place in each batch has two uniform numbers, stratified within the batch. The first picks a domain from the
    uniform mixture. If the second is below the share, the shifted mixture picks its own domain instead. So all other
    places keep their sequence, and a larger share changes the places of a smaller one and more.

    Each domain has one stream: the sequences that its present epoch has not used yet, then whole epochs, each shuffled.
    Going on uses the first ones. A shift uses the ones after those at the places that it changes.

    Parameters
    ----------
    lengths : sequence of int [m]
    used : int64 [sum of lengths]
        How often training has used each sequence so far.
    steps, batch : int
    seed : sequence of int
    """

    def __init__(self, lengths: Sequence[int], used: Ints, steps: int, batch: int, seed: Sequence[int]) -> None:
        picking = np.random.default_rng([*seed, 0])
        self._pick, self._replace = (_stratified(picking, steps, batch) for _ in range(2))
        self.domains: Ints = np.minimum(
            (self._pick * len(lengths)).astype(np.int64), len(lengths) - 1
        )  # [steps, batch]
        starts = np.cumsum([0, *lengths])
        self._streams = [
            _stream(starts[j], used[starts[j] : starts[j + 1]], steps * batch, np.random.default_rng([*seed, 1, j]))
            for j in range(len(lengths))
        ]
        self._base = np.empty_like(self.domains)
        for j, stream in enumerate(self._streams):
            places = self.domains == j
            self._base[places] = stream[: places.sum()]

    def replaced(self, domain: int, share: float) -> NDArray[np.bool_]:
        """Return the places [steps, batch] that a shift of ``share`` to ``domain`` changes."""
        return np.asarray((self._replace < share) & (self.domains != domain))

    def indices(self, domain: int = 0, share: float = 0.0) -> Ints:
        """Return the sequences [steps, batch] when ``share`` of the weight moves to ``domain``."""
        places = self.replaced(domain, share)
        result = self._base.copy()
        first = int((self.domains == domain).sum())
        result[places] = self._streams[domain][first : first + int(places.sum())]
        return result


def _stratified(random: np.random.Generator, steps: int, batch: int) -> NDArray[np.float64]:
    """Return uniform numbers [steps, batch]; each batch has one in every ``1 / batch``, in random order."""
    strata = random.permuted(np.tile(np.arange(batch), (steps, 1)), axis=1)
    return np.asarray((strata + random.random((steps, batch))) / batch)


def _stream(start: int, used: Ints, count: int, random: np.random.Generator) -> Ints:
    """Return at least ``count`` indices: the least used sequences first, then whole epochs."""
    parts = [random.permutation(np.flatnonzero(used == used.min()))]
    while sum(map(len, parts)) < count:
        parts.append(random.permutation(len(used)))
    return start + np.concatenate(parts)
