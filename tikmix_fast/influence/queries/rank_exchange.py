"""Micro-batches of this rank that the other ranks do not know yet."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tikmix_fast.influence.parallel.ranks import Ranks
from tikmix_fast.influence.queries.projected_sums import ProjectedSums, add_by_name
from tikmix_fast.influence.queries.store import Queries
from tikmix_fast.matrix.estimator import Estimator

__all__ = ["PendingMicrobatches"]

Array = NDArray[np.float64]


class PendingMicrobatches:
    """The micro-batches of this rank since the last exchange.

    Every rank's estimator takes the micro-batches of all ranks in the same order: the first of each rank, then the
    second of each, and so on. So every rank has the numbers of a single process that measured all the batches.
    """

    def __init__(self) -> None:
        self._rows: list[Array] = []
        self._projected: dict[str, Tensor] = {}

    def add(self, products: Array, tokens: Array, projected: Mapping[str, Tensor]) -> None:
        """Add one micro-batch: products [q, m], tokens [m], projected gradients [m, k_out, k_in] by name.

        Costs (q + 1) x m numbers of memory until the next exchange.
        """
        self._rows.append(np.concatenate([products, tokens[None]]).reshape(-1))
        add_by_name(self._projected, projected)

    def exchange(self, ranks: Ranks, estimator: Estimator, queries: Queries, projected: ProjectedSums) -> None:
        """Give the estimator all ranks' micro-batches, and ``projected`` the sums of their projected gradients."""
        q, m = len(queries.owners), estimator.m
        of_ranks = ranks.gather(np.stack(self._rows) if self._rows else np.empty((0, (q + 1) * m)))
        self._rows.clear()
        for rows in zip_longest(*of_ranks):
            for row in rows:
                if row is not None:
                    table = row.reshape(q + 1, m)
                    estimator.add(table[:-1], table[-1])
        for name, projection in queries.projections.items():
            device = queries.store[name].device
            mine = self._projected.pop(name, None)
            if mine is None:
                mine = torch.zeros(m, projection.k_out, projection.k_in, dtype=torch.float32, device=device)
            ranks.add_up(mine)
            projected.add({name: mine})
