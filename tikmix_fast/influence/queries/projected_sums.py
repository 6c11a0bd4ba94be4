"""The domains' projected gradients, and the variance that the projection adds to the influence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tikmix_fast import ops
from tikmix_fast.influence.queries.projection import Projection
from tikmix_fast.influence.queries.store import Queries

__all__ = ["ProjectedSums", "add_by_name"]

Array = NDArray[np.float64]


def add_by_name(sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add tensors to the sums of the same name, in place; a new name's tensor becomes its sum."""
    for name, value in more.items():
        sums[name] = sums[name].add_(value) if name in sums else value


class ProjectedSums:
    """Sum the projected gradients of the open round, and the variances of the closed rounds.

    Parameters
    ----------
    projection : Projection or None
        None: every variance is zero.
    n, m : int
        Numbers of tasks and domains.

    Attributes
    ----------
    gradients : dict of str to Tensor [m, k_out, k_in]
        The sums of the open round, by the name of the weight.
    rounds : int
        The number of closed rounds. It may choose the next round's matrices.
    """

    def __init__(self, projection: Projection | None, n: int, m: int) -> None:
        self._projection, self._n, self._m = projection, n, m
        self.rounds = 0
        self.gradients: dict[str, Tensor] = {}
        self._closed = np.zeros((self._n, self._m))
        # The state's variance of a resumed round, until its queries are measured again.
        self._resumed: Array | None = None

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Add the projected gradients of one micro-batch."""
        add_by_name(self.gradients, gradients)

    def variance(self, queries: Queries | None) -> Array:
        """Return the variance that the projection adds to the sums over all micro-batches, [n, m].

        ``queries`` are the open round's, None before they freeze.
        """
        if self._projection is None or not self.gradients:
            return self._closed.copy()
        if queries is None:
            return self._closed * np.nan if self._resumed is None else self._resumed.copy()
        combined = queries.by_task(self._n, self.gradients)
        layers = [
            ops.projection_stderr(gradients, combined[name]).square().cpu().numpy()
            for name, gradients in self.gradients.items()
        ]
        return self._projection.total_variance(self._closed, np.sum(layers, axis=0))

    def close_round(self, queries: Queries | None, keep: float) -> None:
        """Close the round, and multiply the weight of everything so far by ``keep``."""
        self._closed = self.variance(queries) * keep**2 if keep else np.zeros_like(self._closed)
        self.gradients, self._resumed = {}, None
        self.rounds += 1

    def state_dict(self, queries: Queries | None, *, in_round: bool, within_round: bool) -> dict[str, Any]:
        """Return plain JSON types, and the open round's gradients as tensors if a resumed run continues the round."""
        goes_on = in_round and within_round
        variance = self.variance(queries)
        state: dict[str, Any] = {
            "refreshes": self.rounds + (in_round and not goes_on),
            "projection_variance": (self._closed if goes_on else variance).tolist(),
        }
        if goes_on and self.gradients:
            state |= {"projected": dict(self.gradients), "projection_variance_so_far": variance.tolist()}
        return state

    def read_state(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> ProjectedSums:
        """Return new sums that continue from a state of `state_dict`.

        Raises
        ------
        ValueError
            If a part is missing, has the wrong shape, or belongs to other parameters.
        """
        rounds = state.get("refreshes")
        if not isinstance(rounds, int) or rounds < 0:
            raise ValueError(f"state 'refreshes' must be an int of at least 0; got {rounds!r}")
        projected = state.get("projected", {})
        if not set(projected) <= set(parameters) or not all(isinstance(each, Tensor) for each in projected.values()):
            raise ValueError(f"state 'projected' must hold tensors of this model's parameters; got {list(projected)}")
        sums = ProjectedSums(self._projection, self._n, self._m)
        sums.rounds = rounds
        sums._closed = self._array(state, "projection_variance")
        sums.gradients = {name: each.to(parameters[name].device, copy=True) for name, each in projected.items()}
        if projected:
            sums._resumed = self._array(state, "projection_variance_so_far")
        return sums

    def _array(self, state: Mapping[str, Any], name: str) -> Array:
        array = np.array(state.get(name), dtype=np.float64)
        if array.shape != (self._n, self._m):
            raise ValueError(f"state {name!r} must have shape {(self._n, self._m)}; got {array.shape}")
        return array
