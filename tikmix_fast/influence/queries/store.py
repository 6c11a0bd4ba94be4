"""Frozen queries: where they rest, and how a kernel reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tikmix_fast import ops
from tikmix_fast.influence.parallel.ranks import Ranks
from tikmix_fast.influence.queries.offload import Copier, Prefetcher

__all__ = ["Queries", "QueryStore", "sum_dtype"]


class QueryStore(Mapping[str, Tensor]):
    """Queries [q, ...] by the name of their parameter; looking one up returns it on the parameter's device.

    Queries that may leave their device rest in host memory if the device has a copier. Such a query is valid until the
    next one is looked up.

    Parameters
    ----------
    values : mapping of str to Tensor, optional
        Queries that stay where they are.
    copiers : mapping of torch.device to Copier, optional
        One for every device whose queries leave.
    sharing : Ranks, optional
        Each of these ranks stores a share of every query that may leave. All of them must look up the same queries in
        the same order.

    Examples
    --------
    >>> store = QueryStore({"weight": torch.ones(1, 2, 3)})
    >>> store.packed("weight", torch.float32).shape
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

    def put(self, name: str, value: Tensor, *, may_leave: bool = False) -> None:
        """Store queries. If they may leave: only this rank's share, or in host memory if their device has a copier."""
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
        """Begin a forward and backward; most passes look up the queries in the same order."""
        for prefetcher in self._prefetchers.values():
            prefetcher.begin()

    def end_pass(self) -> None:
        """End the pass."""
        for prefetcher in self._prefetchers.values():
            prefetcher.end()

    def packed(self, name: str, dtype: torch.dtype) -> ops.PackedQueries:
        """Return the queries of a product's weight as the kernel reads them, for rows of this dtype.

        The kernel multiplies bfloat16 rows with bfloat16 queries at twice the speed, so the first use with such rows
        rounds the queries for good. Queries that stay on the device keep their packed copy until the refresh.
        """
        if (name, dtype) in self._packed:
            return self._packed[name, dtype]
        queries = self[name]
        if dtype == torch.bfloat16 and queries.dtype == torch.float32:
            queries = queries.bfloat16()
            self.put(name, queries, may_leave=name not in self._here)
        packed = ops.pack_queries(queries)
        if name in self._here:
            self._packed[name, dtype] = packed
        return packed


@dataclass(frozen=True)
class Queries:
    """The preconditioned task gradients, frozen.

    Attributes
    ----------
    store : QueryStore
        One query per task and split, by the name of the parameter: [q, *parameter.shape], or [q, k_out, k_in] if the
        parameter is projected.
    owners : list of int [q]
        The task of each query.
    weights : list of float [q]
        The share of each query in its task's target tokens.
    projections : dict of str to LayerProjection
        The projection of every parameter that is measured through one.
    """

    store: QueryStore
    owners: list[int]
    weights: list[float]
    projections: dict[str, ops.LayerProjection] = field(default_factory=dict)

    def by_task(self, n: int, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return one query per task, the weighted mean of its splits: [n, *parameter.shape] by name (default: all)."""
        combined = {}
        for name in self.store if names is None else names:
            value = self.store[name]
            value = value.to(sum_dtype(value))
            weights = value.new_tensor(self.weights).reshape(-1, *(1,) * (value.ndim - 1))
            owners = torch.tensor(self.owners, device=value.device)
            combined[name] = value.new_zeros(n, *value.shape[1:]).index_add_(0, owners, weights * value)
        return combined


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that sums of gradients like this one have: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
