"""Task gradients become queries: they are summed batch by batch, then preconditioned once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tikmix_fast import ops
from tikmix_fast.influence.parallel.ranks import Ranks
from tikmix_fast.influence.preconditioners.protocol import Preconditioner
from tikmix_fast.influence.queries.offload import Copier, can_leave
from tikmix_fast.influence.queries.store import Queries, QueryStore, sum_dtype

__all__ = ["TaskGradients"]


class TaskGradients:
    """Sum the gradients of the tasks' token losses, and deal each task's batches round-robin into its splits.

    Parameters
    ----------
    names : sequence of str
        The tasks.
    splits : int
    copiers : mapping of torch.device to Copier, optional
        One for every device whose sums rest in host memory.
    ranks : Ranks, optional
        The processes that add batches of the same tasks.
    shared : bool
        Each rank keeps a share of the sums over all ranks, instead of the sums of its own batches. The ranks then add
        their batches together, and at any time all of the same task.
    """

    def __init__(
        self,
        names: Sequence[str],
        splits: int,
        copiers: Mapping[torch.device, Copier] | None = None,
        ranks: Ranks | None = None,
        shared: bool = False,
    ) -> None:
        self._sharing = ranks if shared else None
        self._names, self._splits, self._ranks = names, splits, ranks
        self._copiers = copiers or {}
        self._batches = [0] * len(names)
        self._sums: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._tokens: dict[tuple[int, int], float] = {}

    @property
    def begun(self) -> bool:
        """Whether any batch was added."""
        return bool(self._sums)

    def all_usable(self, task: int, usable: bool) -> bool:
        """Return whether this batch may be added; with shared sums, whether the batches of all ranks may.

        Raises
        ------
        ValueError
            If sums are shared and the ranks are at different tasks.
        """
        if self._sharing is None:
            return usable
        votes = np.zeros((len(self._names), 2))
        votes[task] = 1, usable
        votes = self._sharing.total(votes)
        if votes[task, 0] != self._sharing.size:
            at = [name for name, (here, _) in zip(self._names, votes, strict=True) if here]
            raise ValueError(
                f"task must be the same on every rank at any time with share_queries; got {', '.join(map(repr, at))}: "
                "let the ranks go through the tasks in one order, or leave share_queries off"
            )
        return bool(votes[task, 1] == self._sharing.size)

    def add(
        self,
        task: int,
        gradients: Mapping[str, Tensor],
        tokens: float,
        factor: float,
        parameters: Mapping[str, Tensor],
    ) -> None:
        """Add one batch. ``factor`` times the gradients is the gradient of its token losses' sum."""
        # Deal batches round-robin over ranks, so that one batch per rank still fills every split.
        alone = self._ranks is None or self._sharing is not None  # shared: the batches of all ranks count as one
        first, stride = (0, 1) if alone else (self._ranks.index, self._ranks.size)  # type: ignore[union-attr]
        split = task, (first + self._batches[task] * stride) % self._splits
        sums = self._sums.setdefault(split, {})
        if self._sharing is None:
            self._add_own(sums, gradients, factor)
        else:
            self._add_shares(self._sharing, sums, gradients, factor, parameters)
        self._tokens[split] = self._tokens.get(split, 0.0) + tokens
        self._batches[task] += 1

    def _add_own(self, sums: dict[str, Tensor], gradients: Mapping[str, Tensor], factor: float) -> None:
        for name, gradient in gradients.items():
            dense = _dense(gradient)
            copier = self._copiers.get(dense.device) if can_leave(dense.shape) else None
            if name not in sums:
                total = torch.zeros(dense.shape, dtype=sum_dtype(dense), device=dense.device)
            else:
                # Add on the device even if the sum rests in host memory: same numbers, and the host does not wait.
                total = copier.fetch(sums[name]) if copier else sums[name]
            total.add_(dense, alpha=factor)
            sums[name] = copier.to_host(total, into=sums.get(name)) if copier else total

    @staticmethod
    def _add_shares(
        ranks: Ranks,
        sums: dict[str, Tensor],
        gradients: Mapping[str, Tensor],
        factor: float,
        parameters: Mapping[str, Tensor],
    ) -> None:
        # Another rank's batch may reach a parameter that this rank's did not: every rank takes part in every sum.
        for name, parameter in parameters.items():
            total = torch.zeros(parameter.shape, dtype=sum_dtype(parameter), device=parameter.device)
            if name in gradients:
                total.add_(_dense(gradients[name]), alpha=factor)
            if can_leave(parameter.shape):
                total = ranks.share_of_sum(total)
            sums[name] = sums[name].add_(total) if name in sums else total

    def fewest_splits(self) -> int:
        """Return how many splits have a batch, for the task with the fewest; all ranks must call this."""
        return int((self._tokens_of_all() > 0).sum(1).min())

    def freeze(
        self,
        parameters: Mapping[str, Tensor],
        preconditioner: Preconditioner,
        optimizer: Any,
        projections: dict[str, ops.LayerProjection],
    ) -> Queries:
        """Turn the means per target token into queries, one parameter at a time, freeing its sums first.

        Several ranks reduce their sums with one call per parameter, all splits together.

        Raises
        ------
        RuntimeError
            If a task has no batch.
        """
        tokens = self._tokens_of_all()
        unmeasured = [name for name, counts in zip(self._names, tokens, strict=True) if not counts.any()]
        if unmeasured:
            raise RuntimeError(
                f"tasks come first: run engine.task(...) for {', '.join(map(repr, unmeasured))} before domains(...)"
            )
        preconditioner.prepare(parameters, optimizer)
        splits = [(int(task), int(split)) for task, split in np.argwhere(tokens)]
        store = QueryStore(copiers=self._copiers, sharing=self._sharing)
        for name, parameter in parameters.items():
            values = preconditioner.apply(name, self._take_means(name, parameter, splits, tokens))
            if name in projections:
                values = projections[name].project(values)
            store.put(name, values, may_leave=can_leave(parameter.shape, name in projections))
            del values
        owners = [task for task, _ in splits]
        weights = [float(tokens[split] / tokens[split[0]].sum()) for split in splits]
        return Queries(store, owners, weights, projections)

    def _tokens_of_all(self) -> NDArray[np.float64]:
        """Return the target tokens [tasks, splits], summed over all ranks."""
        tokens = np.zeros((len(self._names), self._splits))
        for split, count in self._tokens.items():
            tokens[split] = count
        return tokens if self._ranks is None else self._ranks.total(tokens)

    def _take_means(
        self, name: str, parameter: Tensor, splits: Sequence[tuple[int, int]], tokens: NDArray[np.float64]
    ) -> Tensor:
        copier = self._copiers.get(parameter.device) if can_leave(parameter.shape) else None
        means = torch.zeros((len(splits), *parameter.shape), dtype=sum_dtype(parameter), device=parameter.device)
        shared = self._sharing is not None and can_leave(parameter.shape)
        for mean, split in zip(means, splits, strict=True):
            # None if no batch of this split reached the parameter.
            total = self._sums.get(split, {}).pop(name, None)
            if total is not None and shared and self._sharing is not None:
                mean.copy_(self._sharing.join(total, parameter.shape))
            elif total is not None:
                mean.copy_(copier.fetch(total) if copier else total)
        if self._ranks is not None and not shared:
            self._ranks.add_up(means)
        for mean, split in zip(means, splits, strict=True):
            mean.div_(float(tokens[split]))
        return means


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
