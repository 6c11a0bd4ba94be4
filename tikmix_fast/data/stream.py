"""The global stream of draws from several shuffled domains whose weights change. It does not depend on ranks."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tikmix_fast.data.draw_order import BLOCK, quantize, schedule_block
from tikmix_fast.data.permutation import mix, permute

__all__ = ["Block", "Change", "Origin", "Stream"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Change:
    """New weights [m] from global draw ``at`` on."""

    at: int
    weights: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Origin:
    """The draw at which the weights of a block began; the stream keeps proportions from here on."""

    at: int
    counts: Ints  # [m] draws of each domain before ``at``
    weights: NDArray[np.float64]
    shares: Ints  # weights in units of 2^-48

    @classmethod
    def of(cls, change: Change, counts: Ints) -> Origin:
        """Start with the weights of ``change``; ``counts`` are the draws of each domain so far."""
        return cls(change.at, counts, change.weights, quantize(change.weights))


@dataclass(frozen=True, eq=False)
class Block:
    """Start of a planned block: `BLOCK` draws, or fewer if the weights change before."""

    at: int
    counts: Ints  # [m] draws of each domain before ``at``
    origin: Origin


class Stream:
    """Draws 0, 1, 2, ... of all ranks together, a function of the lengths, the seed and the changes of weights.

    Parameters
    ----------
    lengths : int64 [m]
        Items per domain.
    seed : int
        From 0 to 2^64 - 1.
    block : Block
        First block that the stream can still return.
    changes : list of Change
        Changes after the start of ``block``, in rising order.
    """

    def __init__(self, lengths: Ints, seed: int, block: Block, changes: list[Change]) -> None:
        self.changes = changes  # in rising order, all after the start of the first block
        self.blocks = [block]  # in rising order, without gaps
        self._lengths = lengths
        self._seed = seed
        self._offsets = np.cumsum(lengths) - lengths
        words = np.arange(1, len(lengths) + 1, dtype=np.uint64)
        self._keys = mix(mix(np.array([seed], dtype=np.uint64)) + words)
        self._planned: tuple[Block, NDArray[np.uint16]] | None = None

    def end(self, block: Block) -> int:
        """Return the number of the draw after a block."""
        return min([block.at + BLOCK, *(change.at for change in self.changes if change.at > block.at)])

    def block_of(self, at: int) -> Block:
        """Return the block of a draw, and add blocks up to it; the draw must not be before the first block."""
        while (end := self.end(self.blocks[-1])) <= at:
            last = self.blocks[-1]
            counts = self._counts(last, end)
            origin = next((Origin.of(change, counts) for change in self.changes if change.at == end), last.origin)
            self.blocks.append(Block(end, counts, origin))
        return next(block for block in reversed(self.blocks) if block.at <= at)

    def counts_at(self, at: int) -> Ints:
        """Count the draws before ``at`` by domain, int64 [m]."""
        return self._counts(self.block_of(at), at)

    def indices(self, first: int, end: int, step: int) -> Ints:
        """Return the int64 indices of draws first, first + step, ... before ``end``, all in one block."""
        block = self.block_of(first)
        labels = self._labels(block)
        # For each draw, the number of earlier draws of its domain: its place among the draws of that domain.
        many = np.bincount(labels, minlength=len(self._lengths))
        place = np.empty(BLOCK, dtype=np.int64)
        by_domain = np.argsort(labels, kind="stable")
        place[by_domain] = np.arange(BLOCK) - np.repeat(np.cumsum(many) - many - block.counts, many)
        chosen = slice(first - block.at, end - block.at, step)
        domain = labels[chosen]
        length = self._lengths[domain].astype(np.uint64)
        epoch, position = np.divmod(place[chosen].astype(np.uint64), length)
        item = permute(position, length, mix(self._keys[domain] + epoch))
        return self._offsets[domain] + item.astype(np.int64)

    def change(self, change: Change) -> None:
        """Change the weights at a draw, not before the first block; later blocks are planned again."""
        others = [other for other in self.changes if other.at != change.at]
        self.changes = sorted([*others, change], key=operator.attrgetter("at"))
        first = self.blocks[0]
        self.blocks = [block for block in self.blocks if block.at < change.at]
        if not self.blocks:
            self.blocks = [Block(first.at, first.counts, Origin.of(change, first.counts))]

    def forget(self, before: int) -> None:
        """Drop blocks and changes that only draws before ``before`` need."""
        oldest = self.block_of(max(before, self.blocks[0].at))
        self.blocks = [block for block in self.blocks if block.at >= oldest.at]
        self.changes = [change for change in self.changes if change.at > oldest.at]

    def _counts(self, block: Block, at: int) -> Ints:
        drawn = np.bincount(self._labels(block)[: at - block.at], minlength=len(self._lengths))
        return np.asarray(block.counts + drawn)

    def _labels(self, block: Block) -> NDArray[np.uint16]:
        """Return the domain of each draw of a block; cache the plan of the latest block."""
        if self._planned is None or self._planned[0] is not block:
            origin = block.origin
            elapsed, counts = block.at - origin.at, block.counts - origin.counts
            self._planned = block, schedule_block(origin.shares, elapsed, counts, self._seed, block.at)
        return self._planned[1]
