"""A small sketch of the queries, to compare those of different steps."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tikmix_fast.influence.preconditioners.protocol import Preconditioner

__all__ = ["SKETCH_SIZE", "QuerySketch", "Watched"]

Array = NDArray[np.float64]

SKETCH_SIZE = 1021
"""Prime, so that the columns of a weight do not fall into the same place."""


class QuerySketch:
    """Sum every query into few numbers that keep inner products (CountSketch, random signs from parameters' names).

    Cosines of sketches are those of the queries up to about 1 / sqrt(1021) = 3% for each pair; the same parameter gets
    the same signs at every step, on devices of the same type.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def see(self, name: str, queries: Tensor) -> None:
        """Add the queries [q, *shape] of one parameter."""
        flat = queries.detach().flatten(1)
        generator = torch.Generator(device=flat.device).manual_seed(zlib.crc32(name.encode()))
        signs = torch.randint(0, 2, (flat.shape[1],), generator=generator, device=flat.device, dtype=torch.int8)
        signed = torch.nn.functional.pad(flat * signs.mul_(2).sub_(1), (0, -flat.shape[1] % SKETCH_SIZE))
        # On the device: the host waits only when the step is over.
        found = signed.unflatten(1, (-1, SKETCH_SIZE)).sum(1, dtype=torch.float64)
        self._sum = found if self._sum is None else self._sum + found.to(self._sum.device)

    def by_task(self, n: int, owners: Sequence[int], weights: Sequence[float]) -> tuple[Array, Array]:
        """Return each task's sketch [n, 1021], and the share of its squared length that is not noise [n].

        Query q belongs to task ``owners[q]`` and weighs ``weights[q]`` in it. The share is NaN for a task with a single
        split.
        """
        sketches = np.zeros((len(owners), SKETCH_SIZE)) if self._sum is None else self._sum.cpu().numpy()
        whole, signal = np.zeros((n, SKETCH_SIZE)), np.full(n, np.nan)
        for task in range(n):
            mine = np.array(owners) == task
            shares, splits = np.array(weights)[mine], sketches[mine]
            whole[task] = shares @ splits
            length = (whole[task] ** 2).sum()
            if mine.sum() >= 2 and length > 0:
                noise = shares @ ((splits - whole[task]) ** 2).sum(1) / (mine.sum() - 1)
                signal[task] = 1 - noise / length
        return whole, signal


class Watched:
    """A preconditioner that shows the queries it makes to a sketch."""

    def __init__(self, preconditioner: Preconditioner, sketch: QuerySketch) -> None:
        self.name, self._preconditioner, self._sketch = preconditioner.name, preconditioner, sketch

    def prepare(self, parameters: Mapping[str, Tensor], optimizer: Any) -> None:
        """Prepare it."""
        self._preconditioner.prepare(parameters, optimizer)

    def apply(self, name: str, gradients: Tensor) -> Tensor:
        """Apply it, and show what comes out."""
        queries = self._preconditioner.apply(name, gradients)
        self._sketch.see(name, queries)
        return queries
