"""Task gradients on their way to queries: summed batch by batch, then preconditioned once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tikmix_fast import ops
from tikmix_fast.influence.queries.offload import Copier, Prefetcher, can_leave

if TYPE_CHECKING:
    from tikmix_fast.influence.parallel.ranks import Ranks
    from tikmix_fast.influence.preconditioners.adam import Preconditioner

__all__ = ["HeldQueries", "Queries", "TaskGradients", "accumulated"]


class HeldQueries(Mapping[str, Tensor]):
    """Queries by the name of their parameter, each [q, ...], on the parameter's device when they are asked for.

    Those that may leave the device rest in host memory where there is a copier for it. What is returned of them is
    valid until another one is asked for.

    Parameters
    ----------
    values : mapping of str to Tensor, optional
        Queries that stay where they are.
    copiers : mapping of torch.device to Copier, optional
        For the devices whose queries leave.
    sharing : Ranks, optional
        Who holds shares of those that may leave; all of them must ask for the same ones in the same order.

    Examples
    --------
    >>> held = HeldQueries({"weight": torch.ones(1, 2, 3)})
    >>> held.packed("weight", torch.float32).shape
    torch.Size([1, 2, 3])
    """

    def __init__(
        self,
        values: Mapping[str, Tensor] | None = None,
        copiers: Mapping[torch.device, Copier] | None = None,
        sharing: Ranks | None = None,
    ) -> None:
        self._sharing = sharing
        self._shares: dict[str, tuple[Tensor, torch.Size]] = {}
        self._here: dict[str, Tensor] = dict(values or {})
        self._packed: dict[tuple[str, torch.dtype], ops.PackedQueries] = {}
        self._copiers = copiers or {}
        self._away: dict[str, Tensor] = {}
        self._home: dict[str, torch.device] = {}
        self._prefetchers = {device: Prefetcher(copier, self._away) for device, copier in self._copiers.items()}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._shares and self._sharing is not None:
            return self._sharing.join(*self._shares[name])
        return self._here[name] if name in self._here else self._prefetchers[self._home[name]].get(name)

    def __iter__(self) -> Iterator[str]:
        yield from self._here
        yield from self._away
        yield from self._shares

    def __len__(self) -> int:
        return len(self._here) + len(self._away) + len(self._shares)

    def hold(self, name: str, value: Tensor, *, may_leave: bool = False) -> None:
        """Hold queries; if they may leave, in host memory where their device has a copier, or this rank's share."""
        if may_leave and self._sharing is not None:
            self._shares[name] = self._sharing.share(value), value.shape
            return
        copier = self._copiers.get(value.device) if may_leave else None
        if copier is None:
            self._here[name] = value
            return
        self._away[name], self._home[name] = copier.to_host(value), value.device
        self._prefetchers[value.device].forget(name)

    def begin_pass(self) -> None:
        """Begin a forward and backward that will ask for queries in some order, the same every time as a rule."""
        for prefetcher in self._prefetchers.values():
            prefetcher.begin()

    def end_pass(self) -> None:
        """End it."""
        for prefetcher in self._prefetchers.values():
            prefetcher.end()

    def packed(self, name: str, dtype: torch.dtype) -> ops.PackedQueries:
        """Return the queries of the weight of a product as the kernel reads them, for rows of this dtype.

        The kernel multiplies bfloat16 rows with bfloat16 queries at twice the speed: such queries are rounded when
        first used, and the float32 ones let go. Of queries that stay here the packed copy is kept until the refresh.
        """
        if (name, dtype) in self._packed:
            return self._packed[name, dtype]
        queries = self[name]
        if dtype == torch.bfloat16 and queries.dtype == torch.float32:
            queries = queries.bfloat16()
            self.hold(name, queries, may_leave=name not in self._here)
        packed = ops.pack_queries(queries)
        if name in self._here:
            self._packed[name, dtype] = packed
        return packed


@dataclass(frozen=True)
class Queries:
    """The preconditioned task gradients, frozen.

    Attributes
    ----------
    held : HeldQueries
        One query [q, *parameter.shape] per task and split, by the name of the parameter; of a projected one [q, k_out,
        k_in].
    owners : list of int [q]
        The task of each query.
    weights : list of float [q]
        Its share of its task's target tokens.
    projections : dict of str to LayerProjection
        The parameters that are measured through a projection.
    """

    held: HeldQueries
    owners: list[int]
    weights: list[float]
    projections: dict[str, ops.LayerProjection] = field(default_factory=dict)

    def by_task(self, n: int, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Combine the splits of every task into its one query, [n, *parameter.shape] by name (default: of all)."""
        combined = {}
        for name in self.held if names is None else names:
            value = self.held[name]
            value = value.to(accumulated(value))
            weights = value.new_tensor(self.weights).reshape(-1, *(1,) * (value.ndim - 1))
            owners = torch.tensor(self.owners, device=value.device)
            combined[name] = value.new_zeros(n, *value.shape[1:]).index_add_(0, owners, weights * value)
        return combined


class TaskGradients:
    """The summed gradients of the tasks' token losses, each task's batches dealt in turn into its splits.

    Parameters
    ----------
    names : sequence of str
        The tasks.
    splits : int
    copiers : mapping of torch.device to Copier, optional
        For the devices whose sums rest in host memory.
    ranks : Ranks, optional
        Who else adds batches of the same tasks.
    shared : bool
        Each rank holds a share of the sums of all, not the sums of its own batches: they add batches of one task at a
        time, together.
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
        """Whether there is a sum yet."""
        return bool(self._sums)

    def all_usable(self, task: int, usable: bool) -> bool:
        """Return whether a batch may be added; where sums are shared, whether that of every rank may.

        Raises
        ------
        ValueError
            If sums are shared and the ranks are not at the same task.
        """
        if self._sharing is None:
            return usable
        said = np.zeros((len(self._names), 2))
        said[task] = 1, usable
        said = self._sharing.total(said)
        if said[task, 0] != self._sharing.size:
            at = [name for name, (here, _) in zip(self._names, said, strict=True) if here]
            raise ValueError(
                f"task must be the same on every rank at a time with share_queries; got {', '.join(map(repr, at))}: "
                "let the ranks go through the tasks in one order, or leave share_queries off"
            )
        return bool(said[task, 1] == self._sharing.size)

    def add(
        self,
        task: int,
        gradients: Mapping[str, Tensor],
        tokens: float,
        factor: float,
        parameters: Mapping[str, Tensor],
    ) -> None:
        """Add one batch: ``factor`` times the gradients is the gradient of the summed loss of its ``tokens``."""
        if self._sharing is not None:
            self._add_together(self._sharing, task, gradients, tokens, factor, parameters)
            return
        # Dealt as if the ranks' batches came in turn: one batch a rank fills the splits too.
        first, stride = (0, 1) if self._ranks is None else (self._ranks.index, self._ranks.size)
        split = task, (first + self._batches[task] * stride) % self._splits
        sums = self._sums.setdefault(split, {})
        for name, gradient in gradients.items():
            dense = _dense(gradient)
            copier = self._copiers.get(dense.device) if can_leave(dense.shape) else None
            if name not in sums:
                total = torch.zeros(dense.shape, dtype=accumulated(dense), device=dense.device)
            else:
                # Added up on the device, wherever the sum rests: the same numbers, and no waiting for the host.
                total = copier.fetch(sums[name]) if copier else sums[name]
            total.add_(dense, alpha=factor)
            sums[name] = copier.to_host(total, into=sums.get(name)) if copier else total
        self._tokens[split] = self._tokens.get(split, 0.0) + tokens
        self._batches[task] += 1

    def _add_together(
        self,
        ranks: Ranks,
        task: int,
        gradients: Mapping[str, Tensor],
        tokens: float,
        factor: float,
        parameters: Mapping[str, Tensor],
    ) -> None:
        """Add the batches of all ranks as one."""
        split = task, self._batches[task] % self._splits
        sums = self._sums.setdefault(split, {})
        # What no batch of this rank reached, one of another's may have: every rank takes part in every sum.
        for name, parameter in parameters.items():
            total = torch.zeros(parameter.shape, dtype=accumulated(parameter), device=parameter.device)
            if name in gradients:
                total.add_(_dense(gradients[name]), alpha=factor)
            if can_leave(parameter.shape):
                total = ranks.share_of_sum(total)
            sums[name] = sums[name].add_(total) if name in sums else total
        self._tokens[split] = self._tokens.get(split, 0.0) + tokens
        self._batches[task] += 1

    def fewest_splits(self) -> int:
        """Return how many splits have batches on any rank, of the task that has the fewest; every rank asks."""
        return int((self._tokens_of_all() > 0).sum(1).min())

    def freeze(
        self,
        parameters: Mapping[str, Tensor],
        preconditioner: Preconditioner,
        optimizer: Any,
        projections: dict[str, ops.LayerProjection],
    ) -> Queries:
        """Turn the means per target token into queries, parameter by parameter, freeing the sums as it goes.

        With several ranks the sums are those of all of them: one reduction per parameter, of all splits.

        Raises
        ------
        RuntimeError
            If a task has no batch.
        """
        tokens = self._tokens_of_all()
        unmeasured = self._without_any(tokens)
        if unmeasured:
            raise RuntimeError(
                f"tasks come first: run engine.task(...) for {', '.join(map(repr, unmeasured))} before domains(...)"
            )
        preconditioner.prepare(parameters, optimizer)
        splits = [(int(task), int(split)) for task, split in np.argwhere(tokens)]
        held = HeldQueries(copiers=self._copiers, sharing=self._sharing)
        for name, parameter in parameters.items():
            values = preconditioner.apply(name, self._take_means(name, parameter, splits, tokens))
            if name in projections:
                values = projections[name].project(values)
            held.hold(name, values, may_leave=can_leave(parameter.shape, name in projections))
            del values
        owners = [task for task, _ in splits]
        weights = [float(tokens[split] / tokens[split[0]].sum()) for split in splits]
        return Queries(held, owners, weights, projections)

    def _tokens_of_all(self) -> NDArray[np.float64]:
        """Return the target tokens of every task and split, of all ranks together."""
        tokens = np.zeros((len(self._names), self._splits))
        for split, count in self._tokens.items():
            tokens[split] = count
        return tokens if self._ranks is None else self._ranks.total(tokens)

    def _without_any(self, tokens: NDArray[np.float64]) -> list[str]:
        return [name for name, counts in zip(self._names, tokens, strict=True) if not counts.any()]

    def _take_means(
        self, name: str, parameter: Tensor, splits: Sequence[tuple[int, int]], tokens: NDArray[np.float64]
    ) -> Tensor:
        copier = self._copiers.get(parameter.device) if can_leave(parameter.shape) else None
        means = torch.zeros((len(splits), *parameter.shape), dtype=accumulated(parameter), device=parameter.device)
        shared = self._sharing is not None and can_leave(parameter.shape)
        for mean, split in zip(means, splits, strict=True):
            # A parameter that this split's batches did not reach has no gradient there.
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


def accumulated(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which gradients like this one are summed."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
