"""How much memory the engine will take, counted before the first pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from tikmix_fast import ops
from tikmix_fast.influence.parallel.fully_sharded import is_sharded
from tikmix_fast.influence.passes.recorder import LOOKED_UP_TOGETHER
from tikmix_fast.influence.queries.held import accumulated
from tikmix_fast.influence.queries.offload import ALIGNMENT, can_leave
from tikmix_fast.influence.queries.projection import Projection, projected_weights
from tikmix_fast.influence.torch_private import without_memory

__all__ = ["MemoryEstimate", "estimate_memory", "readable_size"]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that the engine takes on one device, besides the model, its gradients, activations and optimizer.

    Attributes
    ----------
    device : str
    task_gradients : int
        Sums of task gradients, from the first task to the first domains.
    queries, packed : int
        From the first domains on: the queries, and copies of them in the order in which a kernel reads them.
    visitors : int
        The place of queries that rest in host memory while they visit the device.
    tasks, freezing, domains : int
        The most at a time in each phase: during `task`, when the queries freeze, and during `domains`.
    host : int
        The most at a time in pinned host memory.

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
        """The most at any time on the device, bytes."""
        return max(self.tasks, self.freezing, self.domains)

    def __str__(self) -> str:
        size = readable_size
        held = [f"{size(self.queries)} of queries"]
        held += [f"{size(self.packed)} packed"] if self.packed else []
        held += [f"{size(self.visitors)} for visitors"] if self.visitors else []
        return (
            f"on {self.device} at most {size(self.peak)}: tasks {size(self.tasks)} ({size(self.task_gradients)} of "
            f"sums), freezing {size(self.freezing)}, domains {size(self.domains)} ({', '.join(held)})"
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
    """What is known of one parameter: bytes of its stacked sums, of its queries at rest, and of what it passes by."""

    sums: int  # of all queries, as summed
    frozen: int  # of its queries when they freeze
    resting: int  # of its queries after the first pass
    packed: int
    gradient: int  # of one gradient
    scratch: int  # while its queries freeze, beside the stack
    sums_leave: bool
    queries_leave: bool


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
        How many.
    projection : Projection or None
    adam : bool
        Whether the preconditioner is Adam's.
    away : bool
        Whether sums and queries rest in host memory.
    shares : int
        How many ranks hold shares of sums and queries.
    checked : bool
        Whether conservation is.
    dtype, tokens
        As in `InfluenceEngine.memory_estimate`.
    """
    if shares > 1:
        return _shared(
            estimate_memory(
                model,
                parameters,
                queries=queries,
                domains=domains,
                projection=projection,
                adam=adam,
                away=True,
                shares=1,
                checked=checked,
                dtype=dtype,
                tokens=tokens,
            ),
            shares,
        )
    products = _product_weights(model, parameters)
    dim = None if projection is None else projection.dim
    projected = set() if projection is None else projected_weights(model, parameters, projection.dim, projection.tables)
    weights: dict[str, _Weight] = {}
    for name, p in parameters.items():
        wide = accumulated(p).itemsize
        count = p.numel()
        small = (dim or 0) ** 2 if name in projected else count
        half = name in products and name not in projected and (dtype or p.dtype) == torch.bfloat16 and wide == 4
        resting = torch.bfloat16 if half else accumulated(p)
        scratch = (count * wide) * (2 if adam and p.dtype == torch.bfloat16 else 1) if adam else 0
        if name in projected and dim is not None:
            scratch = max(scratch, _projecting(queries, dim, p.shape[0], p.shape[1], wide))
        leaves = away and can_leave(p.shape)
        queries_leave = away and can_leave(p.shape, name in projected)
        panels = name in products and name not in projected
        weights[name] = _Weight(
            sums=queries * count * wide,
            frozen=queries * small * wide,
            resting=queries * small * (2 if half else wide),
            packed=_panel_bytes((queries, *p.shape), resting, p.device) if panels else 0,
            gradient=count * p.element_size(),
            scratch=scratch,
            sums_leave=leaves,
            queries_leave=queries_leave,
        )
    each = list(weights.values())
    task_gradients = sum(w.sums for w in each if not w.sums_leave)
    one_sum = max((w.sums // queries for w in each if w.sums_leave), default=0)
    freezing, host = _freezing(each, queries)
    held = sum(w.resting for w in each if not w.queries_leave)
    packed = sum(w.packed for w in each if not w.queries_leave)
    tied = [name for name in weights if name in products and _is_table(model, parameters[name])]
    visitors, packing, first_pass = _visiting([*tied, *reversed(weights)], weights)
    passing = _passing(parameters, products, projected, queries, domains, dim or 0, dtype, tokens)
    checking = _checking(parameters) if checked else 0
    projected_gradients = 2 * len(projected) * domains * (dim or 0) ** 2 * 4
    return MemoryEstimate(
        device=str(next(iter(parameters.values())).device) if parameters else "cpu",
        task_gradients=task_gradients,
        queries=held,
        packed=packed,
        visitors=visitors,
        tasks=task_gradients + one_sum + sum(w.gradient for w in each),
        freezing=freezing,
        domains=max(
            _rounding(list(reversed(each))) + first_pass + passing,
            held + packed + visitors + max(packing + passing, checking),
        )
        + projected_gradients,
        host=host,
    )


def _shared(away: MemoryEstimate, shares: int) -> MemoryEstimate:
    """Return the estimate where what rests in host memory in ``away`` is shared by so many ranks instead."""
    share = -(-away.host // shares)
    return replace(
        away,
        task_gradients=away.task_gradients + share,
        queries=away.queries + share,
        tasks=away.tasks + share,
        freezing=away.freezing + share,
        domains=away.domains + share,
        host=0,
    )


def _product_weights(model: nn.Module, parameters: Mapping[str, Tensor]) -> set[str]:
    """Return which parameters are taken to be weights of products: matrices that are not only tables."""
    others = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module._parameters.values()
        if parameter is not None
    }
    return {name for name, parameter in parameters.items() if parameter.ndim == 2 and id(parameter) in others}


def _is_table(model: nn.Module, parameter: Tensor) -> bool:
    return any(isinstance(module, nn.Embedding) and module.weight is parameter for module in model.modules())


def _panel_bytes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> int:
    """Return the bytes that packing takes beside the queries: asked of the op itself, on tensors without memory."""
    with without_memory():
        panels = ops.pack_queries(torch.empty(shape, dtype=dtype, device=device)).panels
        return 0 if panels is None else panels.numel() * panels.element_size()


def _projecting(queries: int, dim: int, height: int, width: int, wide: int) -> int:
    """Return what projecting a stack takes besides: the matrices, one side's in float64 first, and one product."""
    matrices = wide * dim * (height + width)
    product = queries * dim * wide * (width + dim)
    return max(matrices + product, wide * dim * height + (16 + wide) * dim * width, (16 + wide) * dim * height)


def _freezing(weights: Sequence[_Weight], queries: int) -> tuple[int, int]:
    """Return the most at a time on the device and on the host while sums turn into queries, one parameter at a time."""
    held = sum(w.sums for w in weights if not w.sums_leave)
    host = sum(w.sums for w in weights if w.sums_leave)
    peak, host_peak = held, host
    for w in weights:
        peak = max(peak, held + w.sums + (w.sums // queries if w.sums_leave else 0))
        if w.sums_leave:
            host -= w.sums
        else:
            held -= w.sums
        peak = max(peak, held + w.sums + w.scratch)
        if w.queries_leave:
            host += w.frozen
            host_peak = max(host_peak, host)
        else:
            held += w.frozen
    return peak, host_peak


def _rounding(weights: Sequence[_Weight]) -> int:
    """Return the most at a time of queries that stay, in the first pass, while those of bfloat16 rows are rounded."""
    held = sum(w.frozen for w in weights if not w.queries_leave)
    peak = held
    for w in weights:
        if w.queries_leave:
            continue
        rounded = w.resting != w.frozen
        peak = max(peak, held + w.resting if rounded else held)
        held += w.resting - w.frozen + w.packed
        peak = max(peak, held)
    return peak


def _visiting(order: Sequence[str], weights: Mapping[str, _Weight]) -> tuple[int, int, int]:
    """Return the place of visitors once their order is known, what packing one takes, and both in the first pass.

    Then one is there at a time, and those of bfloat16 rows are rounded.
    """
    leaving = [weights[name] for name in order if weights[name].queries_leave]
    if not leaving:
        return 0, 0, 0
    pairs = [_room(one.resting) + _room(other.resting) for one, other in pairwise(leaving) if one is not other]
    packing = max(w.packed for w in leaving)
    rounded = max(w.packed + (w.resting if w.resting != w.frozen else 0) for w in leaving)
    return max(pairs, default=_room(leaving[0].resting)), packing, max(_room(w.frozen) for w in leaving) + rounded


def _room(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _passing(
    parameters: Mapping[str, Tensor],
    products: set[str],
    projected: set[str],
    queries: int,
    domains: int,
    dim: int,
    dtype: torch.dtype | None,
    tokens: int,
) -> int:
    """Return the most that the reading of one parameter's gradient takes while the backward passes it."""
    most = 0
    for name, p in parameters.items():
        columns = p.shape[-1] if p.ndim else 1
        widened = 4 * columns * tokens if (dtype or p.dtype) in (torch.bfloat16, torch.float16) else 0
        if name in projected:
            taken = 8 * tokens * dim * 2 + 8 * (queries + domains) * dim**2
        elif name in products:
            taken = 0
        elif p.ndim == 2:
            together = min(tokens, 256 if p.device.type == "cpu" else LOOKED_UP_TOGETHER)
            taken = widened + 8 * columns * together + 8 * queries * tokens
        else:
            taken = widened + 4 * columns * tokens
        most = max(most, taken)
    return most


def _checking(parameters: Mapping[str, Tensor]) -> int:
    """Return what conservation takes: gradients kept from before, and a few float64 copies of one at a time.

    Of a sharded parameter the gradient of the pass is kept.
    """
    kept = sum(p.nbytes if is_sharded(p) else 0 if p.grad is None else p.grad.nbytes for p in parameters.values())
    copies = max((8 * p.numel() * (2 if p.grad is None else 4) for p in parameters.values()), default=0)
    return kept + copies
