"""Count the memory that the engine will take, before the first pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tikmix_fast import ops
from tikmix_fast.influence.parallel.fully_sharded import is_sharded
from tikmix_fast.influence.passes.influence_sink import LOOKED_UP_TOGETHER
from tikmix_fast.influence.queries.offload import aligned, can_leave, room_for_two
from tikmix_fast.influence.queries.projection import Projection, projected_weights
from tikmix_fast.influence.queries.store import sum_dtype
from tikmix_fast.influence.torch_private import without_memory

__all__ = ["MemoryEstimate", "estimate_memory", "readable_size"]


@dataclass(frozen=True)
class MemoryEstimate:
    """The engine's memory on one device in bytes, without the model, its gradients, activations and optimizer.

    Attributes
    ----------
    device : str
    task_gradients : int
        Sums of task gradients, from the first `task` to the first `domains`.
    queries, packed : int
        Queries, and their copies in the order in which a kernel reads them, from the first `domains` on.
    visitors : int
        Room on the device for queries that rest in host memory.
    tasks, freezing, domains : int
        The peak of each phase: during `task`, when the queries freeze, and during `domains`.
    host : int
        The peak of pinned host memory.

    Examples
    --------
    >>> print(MemoryEstimate("cuda:0", 8 << 30, 6 << 30, 0, 0, 9 << 30, 9 << 30, 7 << 30, 0))
    on cuda:0 at most 9.0 GiB: tasks 9.0 GiB (8.0 GiB of sums), freezing 9.0 GiB, domains 7.0 GiB (6.0 GiB of queries)
    """

    device: str
    task_gradients: int
    queries: int
    packed: int
    visitors: int
    tasks: int
    freezing: int
    domains: int
    host: int

    @property
    def peak(self) -> int:
        """The peak on the device over all phases, bytes."""
        return max(self.tasks, self.freezing, self.domains)

    def __str__(self) -> str:
        size = readable_size
        parts = [f"{size(self.queries)} of queries"]
        parts += [f"{size(self.packed)} packed"] if self.packed else []
        parts += [f"{size(self.visitors)} for visitors"] if self.visitors else []
        return (
            f"on {self.device} at most {size(self.peak)}: tasks {size(self.tasks)} ({size(self.task_gradients)} of "
            f"sums), freezing {size(self.freezing)}, domains {size(self.domains)} ({', '.join(parts)})"
            + (f"; in host memory {size(self.host)}" if self.host else "")
        )


def readable_size(size: float) -> str:
    """Return a number of bytes in the largest unit that fits.

    Examples
    --------
    >>> readable_size(3 << 29)
    '1.5 GiB'
    """
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@dataclass(frozen=True)
class _Weight:
    """The bytes of one parameter's tensors, and whether its sums and its queries leave the device."""

    sums: int  # of all queries, before they freeze
    frozen: int  # its queries when they freeze
    resting: int  # its queries after the first pass
    packed: int
    gradient: int
    scratch: int  # beside the stack of sums, while the queries freeze
    reading: int  # while the backward reads its gradient
    sums_leave: bool
    queries_leave: bool

    @property
    def rounding(self) -> int:
        """The rounded copy, if the first pass rounds the queries."""
        return self.resting if self.resting != self.frozen else 0


def estimate_memory(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    *,
    queries: int,
    domains: int,
    projection: Projection | None,
    adam: bool,
    away: bool,
    shares: int,
    checked: bool,
    dtype: torch.dtype | None,
    tokens: int,
) -> MemoryEstimate:
    """Count what `InfluenceEngine` allocates for these parameters, all on one device.

    Parameters
    ----------
    model : nn.Module
    parameters : mapping of str to Tensor
    queries, domains : int
        Their numbers.
    projection : Projection or None
    adam : bool
        Whether the preconditioner is Adam's.
    away : bool
        Whether sums and queries rest in host memory.
    shares : int
        The number of ranks that each hold a share of sums and queries.
    checked : bool
        Whether passes check conservation.
    dtype, tokens
        As in `InfluenceEngine.memory_estimate`.
    """
    dim = 0 if projection is None else projection.dim
    projected = set() if projection is None else projected_weights(model, parameters, dim, projection.tables)
    products = _product_weights(model, parameters) - projected
    counts = {"queries": queries, "domains": domains, "tokens": tokens}
    by_name = {
        name: _weight(
            p,
            dim=dim if name in projected else 0,
            product=name in products,
            adam=adam,
            away=away or shares > 1,
            dtype=dtype or p.dtype,
            **counts,
        )
        for name, p in parameters.items()
    }
    weights = list(by_name.values())
    residents = [w for w in weights if not w.queries_leave]
    task_gradients = sum(w.sums for w in weights if not w.sums_leave)
    one_sum = _most(w.sums // queries for w in weights if w.sums_leave)
    at_rest, packed = sum(w.resting for w in residents), sum(w.packed for w in residents)
    freezing, host = _freezing(weights, queries)
    # The backward uses tied heads first, and then the parameters from the last to the first.
    tied = [name for name, p in parameters.items() if name in products and _is_table(model, p)]
    leaving = [name for name in [*tied, *reversed(by_name)] if by_name[name].queries_leave]
    visits = [by_name[name] for name in leaving]
    visitors = room_for_two([(name, by_name[name].resting) for name in leaving])
    first_visit = _most(aligned(w.frozen) for w in visits) + _most(w.packed + w.rounding for w in visits)
    reading, packing = _most(w.reading for w in weights), _most(w.packed for w in visits)
    measuring = max(
        _rounding(residents[::-1]) + first_visit + reading,
        at_rest + packed + visitors + max(packing + reading, _checking(parameters) if checked else 0),
    )
    measuring += 2 * len(projected) * domains * dim**2 * 4  # projected gradients of this pass and of the round
    share = -(-host // shares) if shares > 1 else 0  # what would rest in host memory is shared by the ranks instead
    return MemoryEstimate(
        device=str(next(iter(parameters.values())).device) if parameters else "cpu",
        task_gradients=task_gradients + share,
        queries=at_rest + share,
        packed=packed,
        visitors=visitors,
        tasks=task_gradients + one_sum + sum(w.gradient for w in weights) + share,
        freezing=freezing + share,
        domains=measuring + share,
        host=host if shares == 1 else 0,
    )


def _weight(
    p: Tensor,
    *,
    queries: int,
    domains: int,
    dim: int,
    product: bool,
    adam: bool,
    away: bool,
    dtype: torch.dtype,
    tokens: int,
) -> _Weight:
    """Count one parameter; ``dim`` is 0 if it is not projected, ``dtype`` that of the rows that meet it."""
    count, wide = p.numel(), sum_dtype(p).itemsize
    resting = torch.bfloat16 if product and dtype == torch.bfloat16 and wide == 4 else sum_dtype(p)
    elements = dim**2 if dim else count
    scratch = count * wide * (2 if p.dtype == torch.bfloat16 else 1) if adam else 0
    columns = p.shape[-1] if p.ndim else 1
    reading = 4 * columns * tokens if dtype in (torch.bfloat16, torch.float16) else 0  # widened rows
    if dim:
        scratch = max(scratch, _projecting(queries, dim, p.shape[0], p.shape[1], wide))
        reading = 8 * tokens * dim * 2 + 8 * (queries + domains) * dim**2
    elif product:
        reading = 0
    elif p.ndim == 2:
        together = min(tokens, 256 if p.device.type == "cpu" else LOOKED_UP_TOGETHER)
        reading += 8 * columns * together + 8 * queries * tokens
    else:
        reading += 4 * columns * tokens
    return _Weight(
        sums=queries * count * wide,
        frozen=queries * elements * wide,
        resting=queries * elements * resting.itemsize,
        packed=_panel_bytes((queries, *p.shape), resting, p.device) if product else 0,
        gradient=count * p.element_size(),
        scratch=scratch,
        reading=reading,
        sums_leave=away and can_leave(p.shape),
        queries_leave=away and can_leave(p.shape, bool(dim)),
    )


def _product_weights(model: nn.Module, parameters: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the matrices that are not only tables; they are assumed to be weights of products."""
    others = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module._parameters.values()
    }
    return {name for name, parameter in parameters.items() if parameter.ndim == 2 and id(parameter) in others}


def _is_table(model: nn.Module, parameter: Tensor) -> bool:
    return any(isinstance(module, nn.Embedding) and module.weight is parameter for module in model.modules())


def _panel_bytes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> int:
    """Return the bytes of the packed copy, by packing tensors without memory."""
    with without_memory():
        panels = ops.pack_queries(torch.empty(shape, dtype=dtype, device=device)).panels
        return 0 if panels is None else panels.numel() * panels.element_size()


def _projecting(queries: int, dim: int, height: int, width: int, wide: int) -> int:
    """Return the scratch of projecting a stack: both matrices (each first in float64) and one product."""
    matrices = wide * dim * (height + width)
    product = queries * dim * wide * (width + dim)
    return max(matrices + product, wide * dim * height + (16 + wide) * dim * width, (16 + wide) * dim * height)


def _freezing(weights: Sequence[_Weight], queries: int) -> tuple[int, int]:
    """Return the peaks on the device and on the host while sums become queries, one parameter at a time."""
    device = sum(w.sums for w in weights if not w.sums_leave)
    host = sum(w.sums for w in weights if w.sums_leave)
    peak, host_peak = device, host
    for w in weights:
        peak = max(peak, device + w.sums + (w.sums // queries if w.sums_leave else 0))
        if w.sums_leave:
            host -= w.sums
        else:
            device -= w.sums
        peak = max(peak, device + w.sums + w.scratch)
        if w.queries_leave:
            host += w.frozen
        else:
            device += w.frozen
        host_peak = max(host_peak, host)
    return peak, host_peak


def _rounding(residents: Sequence[_Weight]) -> int:
    """Return the peak of the queries that stay, while the first pass rounds and packs one after the other."""
    size = peak = sum(w.frozen for w in residents)
    for w in residents:
        peak = max(peak, size + w.rounding)
        size += w.resting - w.frozen + w.packed
        peak = max(peak, size)
    return peak


def _checking(parameters: Mapping[str, Tensor]) -> int:
    """Return the bytes that conservation takes: a copy of each earlier gradient, and float64 copies of one at a time.

    Sharded parameters have no copy of the earlier gradient, but one of the pass's.
    """
    copies = sum(p.nbytes if is_sharded(p) else 0 if p.grad is None else p.grad.nbytes for p in parameters.values())
    return copies + _most(8 * p.numel() * (2 if p.grad is None else 4) for p in parameters.values())


def _most(sizes: Iterable[int]) -> int:
    return max(sizes, default=0)
