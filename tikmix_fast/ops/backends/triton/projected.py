"""``tikmix_fast.ops.projected_group_influence``: checks the call, picks the blocks and runs `projected_kernels`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from tikmix_fast.ops.backends.triton.configs import INTERPRETED, capability, choose, multiprocessors
from tikmix_fast.ops.backends.triton.gradient import TRITON_DTYPES, Rows, Strided, check_on_host, precision
from tikmix_fast.ops.backends.triton.projected_kernels import sum_slots, walk_rows
from tikmix_fast.ops.common.device_checks import mark_errors
from tikmix_fast.ops.common.projected_checks import ProjectedArguments
from tikmix_fast.ops.common.projection import factor_matrix

__all__ = ["projected_domain_gradients", "projected_group_influence", "refusal"]

# The most of either size of the gradient that one program can hold in registers beside its rows' projections.
_LARGEST_TILE = 128
# The smallest operand of the matrix units, and the fewest rows that are worth reading a dense factor for.
_SMALLEST_TILE = 16
_ENTRIES_BLOCK = 1024
_TASKS_PER_PROGRAM = 8


@dataclass(frozen=True)
class Blocks:
    """How a program takes its rows.

    Attributes
    ----------
    rows, columns : int
        The part of the rows that meets the factor at a time.
    warps, stages : int
        Warps per program, and blocks of columns in flight.
    """

    rows: int
    columns: int
    warps: int
    stages: int


_OF_INTERPRETER = (Blocks(32, 64, 4, 1),)
# By the kind of the products and the larger side of the tile. Without tuning, the first that is usable is taken. With
# 16-bit rows, none spills in its loops over columns for sm_80 and sm_90, but for those in `_SPILLING`.
_BLOCKS = {
    ("wgmma", 64): (Blocks(64, 64, 4, 4), Blocks(64, 64, 8, 4), Blocks(32, 64, 4, 4)),
    ("wgmma", 128): (Blocks(64, 64, 8, 3), Blocks(64, 32, 8, 4), Blocks(32, 64, 8, 4)),
    ("mma", 64): (Blocks(32, 64, 4, 4), Blocks(64, 64, 8, 3)),
    ("mma", 128): (Blocks(32, 32, 8, 4),),
    ("float", 64): (Blocks(32, 32, 8, 3),),
    ("float", 128): (Blocks(16, 32, 8, 3),),
}
# By Triton's version: blocks that it compiles with spills in a loop, so that they are not used there.
_SPILLING = {("3.8", "wgmma", 128): Blocks(64, 64, 8, 3)}


@dataclass(frozen=True)
class _Slots:
    """The results of the first kernel, for the second.

    Attributes
    ----------
    gradients : float32 Tensor [ranges + m - 1, k_out, k_in]
    status : int32 Tensor [ranges]
        For each range, the bits that say what is wrong.
    rows_per_range : int
    """

    gradients: Tensor
    status: Tensor
    rows_per_range: int


def refusal(arguments: ProjectedArguments) -> str | None:
    """Return why the kernels cannot take these factors, or None. They take factors of any number of rows k."""
    for name in ("output_factor", "input_factor"):
        dtype: torch.dtype = getattr(arguments, name).dtype
        if dtype.is_floating_point and dtype not in TRITON_DTYPES:
            return f"{name} is {dtype}, none of float32, bfloat16 and float16"
    return None


def projected_group_influence(arguments: ProjectedArguments, flag: Tensor | None = None) -> Tensor:
    """Compute ``tikmix_fast.ops.projected_group_influence``.

    Parameters
    ----------
    arguments : ProjectedArguments
    flag : int32 Tensor [1], optional
        As in `tikmix_fast.ops.backends.triton.gradient.prepare`.

    Returns
    -------
    float64 Tensor [n, m]

    Raises
    ------
    ValueError
        If offsets, order or codes are wrong and the host may read them.
    """
    arguments, flag = _prepare(arguments, flag)
    queries = arguments.queries.contiguous()
    tasks, k_out, k_in = queries.shape
    blocks = triton.cdiv(k_out * k_in, _ENTRIES_BLOCK)
    sums = queries.new_empty(tasks, len(arguments.offsets) - 1, blocks, dtype=torch.float64)
    if sums.numel():
        _reduce(arguments, _fill_slots(arguments), flag, queries, sums)
    elif queries.device.type == "cuda":
        return mark_errors(sums.sum(-1), arguments.offsets, arguments.order, len(arguments.input))
    return sums.sum(-1)


def projected_domain_gradients(arguments: ProjectedArguments, flag: Tensor | None = None) -> Tensor:
    """Compute ``tikmix_fast.ops.projected_domain_gradients``, without waiting for a GPU.

    Parameters
    ----------
    arguments : ProjectedArguments
        Only the shape of the queries is read.
    flag : int32 Tensor [1], optional
        As in `projected_group_influence`.

    Returns
    -------
    float32 Tensor [m, k_out, k_in]

    Raises
    ------
    ValueError
        If offsets, order or codes are wrong and the host may read them.
    """
    arguments, flag = _prepare(arguments, flag)
    input, offsets = arguments.input, arguments.offsets
    gradients = input.new_empty(len(offsets) - 1, *arguments.queries.shape[1:], dtype=torch.float32)
    if gradients.numel():
        _reduce(arguments, _fill_slots(arguments), flag, None, gradients)
    elif input.device.type == "cuda":
        return mark_errors(gradients, offsets, arguments.order, len(input))
    return gradients


def _prepare(arguments: ProjectedArguments, flag: Tensor | None) -> tuple[ProjectedArguments, Tensor]:
    """Check what the host may read, and bring the arguments to where the kernels read them."""
    input, grad_output, offsets, queries, output_factor, input_factor, scale, order = arguments
    rows, device = len(input), input.device
    offsets, flag = check_on_host(offsets, order, rows, device, flag)
    if flag is None:
        for factor, dim in ((output_factor, queries.shape[1]), (input_factor, queries.shape[2])):
            factor_matrix(factor, dim, factor.dtype)  # raises if a code is not a row; on a GPU its column counts as 0
        flag = torch.zeros(1, dtype=torch.int32, device=device)
    order = None if order is None else order.contiguous()
    if INTERPRETED:  # whose arithmetic of bfloat16 is wrong
        input, grad_output, queries, output_factor, input_factor = (
            tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            for tensor in (input, grad_output, queries, output_factor, input_factor)
        )
    offsets, output_factor, input_factor = (tensor.contiguous() for tensor in (offsets, output_factor, input_factor))
    return (
        ProjectedArguments(input, grad_output, offsets, queries, output_factor, input_factor, scale, order),
        flag,
    )


def _product_dtype(rows: Tensor, factor: Tensor) -> torch.dtype:
    """Return the dtype in which rows meet a factor: their own if its entries are integers, exact in every dtype."""
    return torch.promote_types(rows.dtype, factor.dtype) if factor.dtype.is_floating_point else rows.dtype


def _tile(dim: int) -> int:
    return min(max(int(triton.next_power_of_2(dim)), _SMALLEST_TILE), _LARGEST_TILE)


def _candidates(device: torch.device, tile: int, *, exact: bool) -> tuple[Blocks, ...]:
    """Return the blocks to try for the larger side of a tile; ``exact`` if any product is one of float32."""
    if device.type != "cuda":
        return _OF_INTERPRETER
    return _usable("float" if exact else "wgmma" if capability(device)[0] in (9, 10) else "mma", max(tile, 64))


def _usable(kind: str, tile: int) -> tuple[Blocks, ...]:
    """Return the blocks for products of a kind that this version of Triton compiles without spills in a loop."""
    version = ".".join(triton.__version__.split(".")[:2])
    return tuple(blocks for blocks in _BLOCKS[kind, tile] if blocks != _SPILLING.get((version, kind, tile)))


def _fill_slots(arguments: ProjectedArguments) -> _Slots:
    """Run the first kernel with its fastest blocks."""
    input, grad_output, _, queries, output_factor, input_factor, _, _ = arguments
    dtypes = (_product_dtype(input, input_factor), _product_dtype(grad_output, output_factor))
    tiles = (_tile(queries.shape[1]), _tile(queries.shape[2]))
    candidates = _candidates(input.device, max(tiles), exact=torch.float32 in dtypes)
    key = ("projected", *dtypes, output_factor.dtype, input_factor.dtype, *tiles)
    blocks = choose(key, input.device, candidates, lambda blocks: _launch(arguments, dtypes, blocks))
    return _launch(arguments, dtypes, blocks)


def _launch(arguments: ProjectedArguments, dtypes: tuple[torch.dtype, torch.dtype], blocks: Blocks) -> _Slots:
    input, grad_output, offsets, queries, output_factor, input_factor, _, order = arguments
    rows, device = len(input), input.device
    k_out, k_in = queries.shape[1:]
    tiles = triton.cdiv(k_out, _tile(k_out)) * triton.cdiv(k_in, _tile(k_in))
    # Registers leave room for 8 warps on a multiprocessor.
    programs = multiprocessors(device) * max(8 // blocks.warps, 1)
    ranges = max(min(programs // tiles, triton.cdiv(rows, _SMALLEST_TILE)), 1)
    rows_per_range = max(triton.cdiv(rows, ranges), 1)
    ranges = max(triton.cdiv(rows, rows_per_range), 1)
    domains = len(offsets) - 1
    slots = input.new_empty(ranges + domains - 1, k_out, k_in, dtype=torch.float32)
    status = offsets.new_empty(ranges, dtype=torch.int32)
    both_16_bit = torch.float32 not in dtypes
    walk_rows[(ranges, tiles)](
        Rows(Strided.of(input), Strided.of(grad_output), order, grad_output.shape[1], input.shape[1]),
        output_factor,
        input_factor,
        offsets,
        slots,
        status,
        rows,
        rows_per_range,
        domains,
        k_out,
        k_in,
        INPUT_DTYPE=TRITON_DTYPES[dtypes[0]],
        GRAD_DTYPE=TRITON_DTYPES[dtypes[1]],
        PRECISION=precision(torch.float32),
        # Three products of tensor cores keep the float32 precision of the projections, at a hundredth of their cost.
        LAST_PRECISION="tf32x3" if both_16_bit else precision(torch.float32),
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        K_OUT=_tile(k_out),
        K_IN=_tile(k_in),
        STAGES=blocks.stages,
        num_warps=blocks.warps,
    )
    return _Slots(slots, status, rows_per_range)


def _reduce(arguments: ProjectedArguments, slots: _Slots, flag: Tensor, queries: Tensor | None, sums: Tensor) -> None:
    """Run the second kernel."""
    domains = len(arguments.offsets) - 1
    entries = slots.gradients[0].numel()
    tasks = 0 if queries is None else len(queries)
    grid = (domains, triton.cdiv(entries, _ENTRIES_BLOCK), max(triton.cdiv(tasks, _TASKS_PER_PROGRAM), 1))
    sum_slots[grid](
        slots.gradients,
        slots.status,
        arguments.offsets,
        queries,
        sums,
        flag,
        len(arguments.input),
        slots.rows_per_range,
        len(slots.status),
        tasks,
        entries,
        arguments.scale,
        TASKS=_TASKS_PER_PROGRAM,
        BLOCK=_ENTRIES_BLOCK,
    )
