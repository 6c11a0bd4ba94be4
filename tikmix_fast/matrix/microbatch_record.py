"""A bounded record of single micro-batches, for what sums alone cannot tell. numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MicrobatchRecord"]

Array = NDArray[np.float64]

_BLOCKS = 64


class MicrobatchRecord:
    """Per domain the sums of its micro-batches, in at most ``blocks`` blocks of equally many consecutive ones.

    At first every micro-batch is a block of its own. When a domain's blocks are all taken, neighbours are added up
    pairwise, and from then on a block takes twice as many: all data stays in the record, and at least half of the
    blocks are in use. A block holds 2 + 3 n numbers, so the record takes 8 m blocks (2 + 3 n) bytes: 386 kB for 9 tasks
    and 26 domains.

    `forget` makes old blocks weigh less. From then on a micro-batch is a block of its own, and when there is no room
    the two neighbours with the least weight together become one: old blocks hold many, new ones one each.

    Parameters
    ----------
    n, m : int
        Number of tasks and of domains.
    blocks : int
        Even, at least 2.

    Examples
    --------
    >>> record = MicrobatchRecord(1, 1, blocks=2)
    >>> for score in (1.0, 2.0, 3.0):
    ...     record.add(np.array([[4 * score]]), np.array([4.0]), np.zeros((1, 1)), np.zeros((1, 1)))
    >>> tokens, sums = record.of_domain(0)
    >>> tokens, sums
    (array([8., 4.]), array([[12., 12.]]))
    """

    def __init__(self, n: int, m: int, blocks: int = _BLOCKS) -> None:
        if blocks < 2 or blocks % 2:
            raise ValueError(f"blocks must be even and at least 2; got {blocks!r}")
        self.n, self.m, self.blocks = n, m, blocks
        self._size = np.ones(m, dtype=np.int64)  # micro-batches a block
        self._seen = np.zeros(m, dtype=np.int64)  # micro-batches in all; of one that forgets, blocks in use
        self._forgets = False
        # Weighted tokens, sums, first halves' sums, first halves' tokens; and tokens times the square of their weight.
        self._table = np.zeros((m, blocks, 2 + 3 * n))

    def add(self, sums: Array, tokens: Array, first_sums: Array, first_tokens: Array) -> None:
        """Take one micro-batch.

        Parameters
        ----------
        sums : float64 [n, m]
            Tokens times influence.
        tokens : float64 [m]
            Target tokens; a domain without any is not in the micro-batch.
        first_sums, first_tokens : float64 [n, m]
            The part of ``sums``, and of ``tokens``, that belongs to the first half of each task's own batches.
        """
        for j in np.flatnonzero(tokens > 0):
            if self._seen[j] == self._size[j] * self.blocks and self._forgets:
                lightest = int((self._table[j, 1:, 0] + self._table[j, :-1, 0]).argmin())
                self._table[j, lightest] += self._table[j, lightest + 1]
                self._table[j, lightest + 1 : -1] = self._table[j, lightest + 2 :]
                self._table[j, -1] = 0.0
                self._seen[j] -= 1
            elif self._seen[j] == self._size[j] * self.blocks:
                merged = self._table[j].reshape(self.blocks // 2, 2, -1).sum(1)
                self._table[j] = 0.0
                self._table[j, : self.blocks // 2] = merged
                self._size[j] *= 2
            row = self._table[j, self._seen[j] // self._size[j]]
            row += np.concatenate(
                [tokens[j : j + 1], sums[:, j], first_sums[:, j], first_tokens[:, j], tokens[j : j + 1]]
            )
            self._seen[j] += 1

    def forget(self, factor: float) -> None:
        """Multiply the weight of everything so far: its tokens and its sums."""
        if factor == 1.0:
            return
        if not self._forgets:
            self._seen, self._forgets = -(-self._seen // self._size), True
            self._size[:] = 1
        self._table[:, :, :-1] *= factor
        self._table[:, :, -1] *= factor**2

    def clear(self, domains: NDArray[np.bool_]) -> None:
        """Take out everything of some domains."""
        self._table[domains], self._seen[domains], self._size[domains] = 0.0, 0, 1

    def of_domain(self, domain: int) -> tuple[Array, Array]:
        """Return the tokens [k] and the sums [n, k] of a domain's blocks."""
        table = self._used(domain)
        return table[:, 0], table[:, 1 : 1 + self.n].T

    def variances_of_domain(self, domain: int) -> Array:
        """Return to what the variance of each of a domain's sums is proportional [k]: its tokens, if none faded.

        That is the sum of squared weights times tokens, for noise that falls with the tokens of a micro-batch.
        """
        return self._used(domain)[:, -1]

    def halves_of_domain(self, domain: int) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Return sums and tokens [n, k] of a domain's blocks, for either half of the tasks' own batches."""
        n, table = self.n, self._used(domain)
        first_sums, first_tokens = table[:, 1 + n : 1 + 2 * n].T, table[:, 1 + 2 * n : -1].T
        return (first_sums, first_tokens), (table[:, 1 : 1 + n].T - first_sums, table[:, 0] - first_tokens)

    def copy(self) -> MicrobatchRecord:
        """Return a record of its own with the same content."""
        other = MicrobatchRecord(self.n, self.m, self.blocks)
        other._forgets = self._forgets
        other._size, other._seen, other._table = self._size.copy(), self._seen.copy(), self._table.copy()
        return other

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "blocks": self.blocks,
            "size": self._size.tolist(),
            "seen": self._seen.tolist(),
            "table": [self._used(j)[:, : None if self._forgets else -1].tolist() for j in range(self.m)],
            **({"forgets": True} if self._forgets else {}),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], n: int, m: int) -> MicrobatchRecord:
        """Read what `to_dict` wrote.

        Raises
        ------
        ValueError
            If a part is missing, or does not fit n tasks and m domains.
        """
        parts = ("blocks", "size", "seen", "table")
        if (
            not isinstance(content, Mapping)
            or set(content) - {"forgets"} != set(parts)
            or not isinstance(content["blocks"], int)
        ):
            raise ValueError(f"record must be a mapping with {', '.join(parts)}")
        record = cls(n, m, content["blocks"])
        size, seen = (np.array(content[name], dtype=np.int64) for name in ("size", "seen"))
        if size.shape != (m,) or seen.shape != (m,) or len(content["table"]) != m:
            raise ValueError(f"record must have {m} domains")
        if (size < 1).any() or (seen < 0).any() or (seen > size * record.blocks).any():
            raise ValueError("record must not count more micro-batches than its blocks hold")
        record._size, record._seen, record._forgets = size, seen, content.get("forgets") is True
        for j, rows in enumerate(content["table"]):
            used = record._used(j)[:, : None if record._forgets else -1]
            given = np.array(rows, dtype=np.float64) if rows else np.empty((0, used.shape[1]))
            if given.shape != used.shape or not np.isfinite(given).all():
                raise ValueError(f"record must hold {used.shape[0]} blocks of {used.shape[1]} numbers for domain {j}")
            used[:] = given
        if not record._forgets:
            record._table[:, :, -1] = record._table[:, :, 0]
        return record

    def _used(self, domain: int) -> Array:
        return self._table[domain, : -(-self._seen[domain] // self._size[domain])]
