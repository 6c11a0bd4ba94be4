"""Small sketches of the queries, which compare different steps."""

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
"""A prime, so that a column of a weight spreads over all places."""


class QuerySketch:
    """Sum every query into 1021 numbers that preserve inner products (CountSketch).

    The cosine of two sketches differs from that of the queries by about 1 / sqrt(1021) = 3%. The parameter's name seeds
    the random signs, so they are the same at every step on devices of the same type.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, name: str, queries: Tensor) -> None:
        """Add the queries [q, *shape] of one parameter."""
        flat = queries.detach().flatten(1)
        generator = torch.Generator(device=flat.device).manual_seed(zlib.crc32(name.encode()))
        signs = torch.randint(0, 2, (flat.shape[1],), generator=generator, device=flat.device, dtype=torch.int8)
        signed = torch.nn.functional.pad(flat * signs.mul_(2).sub_(1), (0, -flat.shape[1] % SKETCH_SIZE))
        # The sum stays on the device: the host waits only when the step is over.
        part = signed.unflatten(1, (-1, SKETCH_SIZE)).sum(1, dtype=torch.float64)
        self._sum = part if self._sum is None else self._sum + part.to(self._sum.device)

    def by_task(self, n: int, owners: Sequence[int], weights: Sequence[float]) -> tuple[Array, Array]:
        """Return each task's sketch [n, 1021], and the share of its squared length that is signal [n].

        Query q belongs to task ``owners[q]`` with weight ``weights[q]``. The share is NaN for a task with one split.
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
    """A preconditioner that adds its queries to a sketch."""

    def __init__(self, preconditioner: Preconditioner, sketch: QuerySketch) -> None:
        self.name, self._preconditioner, self._sketch = preconditioner.name, preconditioner, sketch

    def prepare(self, parameters: Mapping[str, Tensor], optimizer: Any) -> None:
        """Prepare the preconditioner."""
        self._preconditioner.prepare(parameters, optimizer)

    def apply(self, name: str, gradients: Tensor) -> Tensor:
        """Apply the preconditioner, and add the queries to the sketch."""
        queries = self._preconditioner.apply(name, gradients)
        self._sketch.add(name, queries)
        return queries
