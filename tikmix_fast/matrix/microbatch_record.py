"""A bounded record of single micro-batches, for statistics that need more than sums. numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "MicrobatchRecord"]

Array = NDArray[np.float64]

_BLOCKS = 64


class MicrobatchRecord:
    """Sums over micro-batches per domain, in at most ``blocks`` blocks of equally many consecutive micro-batches.

    At first every micro-batch is a block of its own. When all blocks of a domain are in use, neighbours are added
    pairwise, and from then on a block takes twice as many micro-batches. So no data leaves the record, and at least
    half of the blocks stay in use. A block holds 2 + 3 n numbers; the record takes 8 m blocks (2 + 3 n) bytes, which is
    386 kB for 9 tasks and 26 domains.

    `forget` lowers the weight of old blocks. From then on every new micro-batch is a block of its own. When there is no
    room, the two neighbours with the least total weight become one block.

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
        self._size = np.ones(m, dtype=np.int64)  # micro-batches per block
        self._seen = np.zeros(m, dtype=np.int64)  # micro-batches in total; after `forget`, blocks in use
        self._forgets = False
        # Weighted tokens, sums, first halves' sums, first halves' tokens, and tokens times their weight squared.
        self._table = np.zeros((m, blocks, 2 + 3 * n))

    def add(self, sums: Array, tokens: Array, first_sums: Array, first_tokens: Array) -> None:
        """Add one micro-batch.

        Parameters
        ----------
        sums : float64 [n, m]
            Tokens times influence.
        tokens : float64 [m]
            Target tokens; a domain without any is not in the micro-batch.
        first_sums, first_tokens : float64 [n, m]
            The part of ``sums``, and of ``tokens``, that belongs to the first half of each task's own batches.
        """
        present = np.flatnonzero(tokens > 0)
        for j in present[self._seen[present] == self._size[present] * self.blocks]:
            self._make_room(j)
        numbers = np.concatenate([tokens[None], sums, first_sums, first_tokens, tokens[None]])
        self._table[present, self._seen[present] // self._size[present]] += numbers[:, present].T
        self._seen[present] += 1

    def _make_room(self, domain: int) -> None:
        """Merge blocks of a domain whose blocks are all in use."""
        table = self._table[domain]
        if self._forgets:
            lightest = int((table[1:, 0] + table[:-1, 0]).argmin())
            table[lightest] += table[lightest + 1]
            table[lightest + 1 : -1] = table[lightest + 2 :]
            table[-1] = 0.0
            self._seen[domain] -= 1
        else:
            half = self.blocks // 2
            table[:half] = table.reshape(half, 2, -1).sum(1)
            table[half:] = 0.0
            self._size[domain] *= 2

    def forget(self, factor: float) -> None:
        """Multiply the weight of all micro-batches so far, in their tokens and their sums."""
        if factor == 1.0:
            return
        if not self._forgets:
            self._seen, self._forgets = -(-self._seen // self._size), True
            self._size[:] = 1
        self._table[:, :, :-1] *= factor
        self._table[:, :, -1] *= factor**2

    def clear(self, domains: NDArray[np.bool_]) -> None:
        """Remove all micro-batches of some domains."""
        self._table[domains], self._seen[domains], self._size[domains] = 0.0, 0, 1

    def of_domain(self, domain: int) -> tuple[Array, Array]:
        """Return the tokens [k] and the sums [n, k] of a domain's blocks."""
        table = self._used(domain)
        return table[:, 0], table[:, 1 : 1 + self.n].T

    def variances_of_domain(self, domain: int) -> Array:
        """Return numbers [k] proportional to the variance of a domain's sums: its tokens, if no weight has changed.

        A block's number is the sum of squared weights times tokens. It assumes noise that falls with a micro-batch's
        tokens.
        """
        return self._used(domain)[:, -1]

    def halves_of_domain(self, domain: int) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Return sums and tokens [n, k] of a domain's blocks, for either half of the tasks' own batches."""
        n, table = self.n, self._used(domain)
        first_sums, first_tokens = table[:, 1 + n : 1 + 2 * n].T, table[:, 1 + 2 * n : -1].T
        return (first_sums, first_tokens), (table[:, 1 : 1 + n].T - first_sums, table[:, 0] - first_tokens)

    def copy(self) -> MicrobatchRecord:
        """Return an independent record with the same content."""
        other = MicrobatchRecord(self.n, self.m, self.blocks)
        other._forgets = self._forgets
        other._size, other._seen, other._table = self._size.copy(), self._seen.copy(), self._table.copy()
        return other

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types. The last column is left out while it equals the first."""
        return {
            "blocks": self.blocks,
            "size": self._size.tolist(),
            "seen": self._seen.tolist(),
            "table": [self._used(j)[:, : None if self._forgets else -1].tolist() for j in range(self.m)],
            **({"forgets": True} if self._forgets else {}),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], n: int, m: int) -> MicrobatchRecord:
        """Read the output of `to_dict`.

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
            numbers = np.array(rows, dtype=np.float64) if rows else np.empty((0, used.shape[1]))
            if numbers.shape != used.shape or not np.isfinite(numbers).all():
                raise ValueError(f"record must hold {used.shape[0]} blocks of {used.shape[1]} numbers for domain {j}")
            used[:] = numbers
        if not record._forgets:
            record._table[:, :, -1] = record._table[:, :, 0]
        return record

    def _used(self, domain: int) -> Array:
        """Return the rows [k, 2 + 3 n] of a domain's blocks in use, as a view."""
        return self._table[domain, : -(-self._seen[domain] // self._size[domain])]
