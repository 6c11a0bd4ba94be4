"""The projected op in one pass over the rows: neither they nor their projections go through device memory twice.

A program owns a range of rows and walks the domains that intersect it. It takes a block of rows of one domain, sums
``x = X P_in^T`` and ``y = dY P_out^T`` in float32 registers, adds ``y^T x`` to the k_out x k_in numbers it holds, and
writes those to a slot of their own at the end of the domain or of the range. A second kernel sums a domain's slots in
their order, in float64, and multiplies by the queries. Nothing is added atomically, and which program takes which rows
follows from T and the GPU, so that results are the same bits in every run.

The floor is reading the rows once: ``b T (I + O)`` bytes of b each. Besides that, through the L2 cache: a dense factor
once per block, ``k / (b block_rows)`` of the rows' own bytes (a CountSketch 4 bytes a column, its +-1 made in
registers), and ``8 (ranges + m) k_out k_in`` bytes of slots, written and read. Products take ``2 T (I k_in + O k_out)``
operations; for 16-bit rows a tensor core does them in less time than the bytes need up to k = 128. Beyond 128, tiles of
128 x 128 of the gradient read the rows once each. A block ends where its domain does, so a domain of far fewer rows
than a block costs the matrix units and the L2 cache a whole one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tikmix_fast.ops.backends.triton.configs import INTERPRETED, capability, choose, multiprocessors
from tikmix_fast.ops.backends.triton.gradient import TRITON_DTYPES, precision
from tikmix_fast.ops.common.checks import check_order, domain_bounds
from tikmix_fast.ops.common.device_checks import device_offsets, error_flag, mark_errors
from tikmix_fast.ops.common.projected_checks import ProjectedArguments
from tikmix_fast.ops.common.projection import factor_matrix

__all__ = ["projected_domain_gradients", "projected_group_influence", "refusal"]

# Of the gradient's two sizes, what one program can hold in registers beside its rows' projections.
_LARGEST_TILE = 128
# The matrix units' smallest operand, and the fewest rows that are worth reading a dense factor for.
_SMALLEST_TILE = 16
_OFFSETS_BLOCK = 128
_STATUS_BLOCK = 128
_ENTRIES_BLOCK = 1024
_TASKS_PER_PROGRAM = 8


@dataclass(frozen=True)
class Blocks:
    """How a program takes its rows.

    Attributes
    ----------
    rows, columns : int
        Multiplied by the factor at a time.
    warps, stages : int
        Warps per program, and blocks of columns in flight.
    """

    rows: int
    columns: int
    warps: int
    stages: int


_OF_INTERPRETER = (Blocks(32, 64, 4, 1),)
# By the kind of the products and the tile's larger side; the first is taken untuned. Those of 16-bit rows were compiled
# for sm_80 and sm_90 and have no spill in the loops over columns; the tests compile the first of each again.
_BLOCKS = {
    ("wgmma", 64): (Blocks(64, 64, 4, 4), Blocks(64, 64, 8, 4), Blocks(32, 64, 4, 4)),
    ("wgmma", 128): (Blocks(64, 64, 8, 3), Blocks(64, 32, 8, 4), Blocks(32, 64, 8, 4)),
    ("mma", 64): (Blocks(32, 64, 4, 4), Blocks(64, 64, 8, 3)),
    ("mma", 128): (Blocks(32, 32, 8, 4),),
    ("float", 64): (Blocks(32, 32, 8, 3),),
    ("float", 128): (Blocks(16, 32, 8, 3),),
}


@triton.jit
def _project(
    matrix,
    stride_t,
    stride_d,
    columns,
    rows,
    valid,
    factor,
    factor_stride_k,
    factor_stride_d,
    first_row,
    dim,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return ``matrix[rows] @ P[first_row : first_row + DIM].T`` in float32, 0 where a row is not valid."""
    span = tl.arange(0, COLUMNS).to(tl.int64)
    factor_row = first_row + tl.arange(0, DIM)
    pointers = matrix + rows[:, None] * stride_t + span[None, :] * stride_d
    if factor.dtype.element_ty == tl.int32:
        factor_pointers = factor + span * factor_stride_d
    else:
        factor_pointers = factor + factor_row.to(tl.int64)[:, None] * factor_stride_k + span[None, :] * factor_stride_d
    sums = tl.zeros([ROWS, DIM], tl.float32)
    for start in tl.range(0, columns, COLUMNS, num_stages=STAGES):
        inside = span < columns - start
        block = tl.load(pointers, mask=valid[:, None] & inside[None, :], other=0.0)
        if factor.dtype.element_ty == tl.int32:
            code = tl.load(factor_pointers, mask=inside, other=0)
            sign = tl.where(code < 0, -1.0, 1.0).to(DTYPE)
            code = tl.where(code < 0, ~code, code)
            entries = tl.where(code[None, :] == factor_row[:, None], sign[None, :], 0.0)
        else:
            entries = tl.load(factor_pointers, mask=(factor_row < dim)[:, None] & inside[None, :], other=0)
        sums = tl.dot(block.to(DTYPE), tl.trans(entries.to(DTYPE)), sums, input_precision=PRECISION)
        pointers += COLUMNS * tl.cast(stride_d, tl.int64)
        factor_pointers += COLUMNS * tl.cast(factor_stride_d, tl.int64)
    return sums


@triton.jit
def _walk_rows(
    input,
    grad_output,
    offsets,
    order,
    output_factor,
    input_factor,
    slots,
    status,
    row_count,
    rows_per_range,
    height,
    width,
    domains,
    k_out,
    k_in,
    input_stride_t,
    input_stride_i,
    grad_stride_t,
    grad_stride_o,
    output_stride_k,
    output_stride_o,
    input_factor_stride_k,
    input_factor_stride_i,
    HAS_ORDER: tl.constexpr,
    INPUT_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST_PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K_OUT: tl.constexpr,
    K_IN: tl.constexpr,
    STAGES: tl.constexpr,
    OFFSETS_BLOCK: tl.constexpr,
):
    """Sum ``y^T x`` over one range of rows for one tile of the gradient, domain by domain, each into a slot.

    Domain j's part of range p goes to slot p + j, which no other part has: where p grows, j does not shrink.
    """
    part = tl.program_id(0)
    top = tl.program_id(1) // tl.cdiv(k_in, K_IN) * K_OUT
    left = tl.program_id(1) % tl.cdiv(k_in, K_IN) * K_IN
    row = part.to(tl.int64) * rows_per_range
    last = tl.minimum(row + rows_per_range, row_count)

    domain = 0
    wrong = 0
    for first in range(0, domains, OFFSETS_BLOCK):
        entry = first + tl.arange(0, OFFSETS_BLOCK)
        known = entry < domains
        start = tl.load(offsets + entry, mask=known, other=0)
        end = tl.load(offsets + entry + 1, mask=known, other=row_count)
        domain += tl.sum((known & (end <= row)).to(tl.int32))
        broken = (end < start) | ((entry == 0) & (start != 0)) | ((entry == domains - 1) & (end != row_count))
        wrong |= tl.max((known & broken).to(tl.int32))

    k_out_entry = top + tl.arange(0, K_OUT)
    k_in_entry = left + tl.arange(0, K_IN)
    gradient = tl.zeros([K_OUT, K_IN], tl.float32)
    while row < last:
        # Rows that wrong offsets leave over are those of the domain after the last one.
        end = tl.load(offsets + domain + 1, mask=domain < domains, other=row_count)
        stop = tl.minimum(tl.maximum(end, row), tl.minimum(last, row + ROWS))
        if stop > row:
            rows = row + tl.arange(0, ROWS)
            valid = rows < stop
            if HAS_ORDER:
                rows = tl.load(order + rows, mask=valid, other=0)
                wrong |= 2 * tl.max((valid & ((rows < 0) | (rows >= row_count))).to(tl.int32))
                rows = tl.minimum(tl.maximum(rows, 0), row_count - 1)
            x = _project(
                input, input_stride_t, input_stride_i, width, rows, valid,
                input_factor, input_factor_stride_k, input_factor_stride_i, left, k_in,
                INPUT_DTYPE, PRECISION, ROWS, COLUMNS, K_IN, STAGES,
            )  # fmt: skip
            y = _project(
                grad_output, grad_stride_t, grad_stride_o, height, rows, valid,
                output_factor, output_stride_k, output_stride_o, top, k_out,
                GRAD_DTYPE, PRECISION, ROWS, COLUMNS, K_OUT, STAGES,
            )  # fmt: skip
            gradient = tl.dot(tl.trans(y), x, gradient, input_precision=LAST_PRECISION)
            if ((stop == end) | (stop == last)) & (domain < domains):
                slot = (part + domain).to(tl.int64) * k_out * k_in
                tl.store(
                    slots + slot + k_out_entry.to(tl.int64)[:, None] * k_in + k_in_entry[None, :],
                    gradient,
                    mask=(k_out_entry < k_out)[:, None] & (k_in_entry < k_in)[None, :],
                )
                gradient = tl.zeros([K_OUT, K_IN], tl.float32)
        row = stop
        if stop >= end:
            domain += 1
    if tl.program_id(1) == 0:
        tl.store(status + part, wrong)


@triton.jit
def _sum_slots(
    slots,
    status,
    offsets,
    queries,
    sums,
    flag,
    row_count,
    rows_per_range,
    ranges,
    domains,
    tasks,
    entries,
    scale: tl.float64,
    WITH_QUERIES: tl.constexpr,
    TASKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STATUS_BLOCK: tl.constexpr,
):
    """Sum a domain's slots in float64, for some entries of the gradient, and multiply by the queries if there are any.

    Without queries ``sums`` is the gradient [m, entries], with them it is [n, m, blocks of entries]. Everything is NaN
    and the flag says why where the first kernel found offsets or order wrong.
    """
    domain = tl.program_id(0)
    block = tl.program_id(1)
    wrong = 0
    for first in range(0, ranges, STATUS_BLOCK):
        found = first + tl.arange(0, STATUS_BLOCK)
        found = tl.load(status + found, mask=found < ranges, other=0)
        wrong |= tl.max(found & 1) | tl.max(found & 2)
    if (wrong != 0) & (domain == 0) & (block == 0) & (tl.program_id(2) == 0):
        tl.atomic_or(flag, wrong)

    start = tl.minimum(tl.maximum(tl.load(offsets + domain), 0), row_count)
    end = tl.minimum(tl.maximum(tl.load(offsets + domain + 1), start), row_count)
    entry = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < entries
    gradient = tl.zeros([BLOCK], tl.float64)
    if end > start:
        for part in range(start // rows_per_range, (end - 1) // rows_per_range + 1):
            slot = (part + domain) * entries
            gradient += tl.load(slots + slot + entry, mask=inside, other=0.0).to(tl.float64)
    gradient = tl.where(wrong != 0, float("nan"), gradient * scale)
    if WITH_QUERIES:
        first = tl.program_id(2).to(tl.int64) * TASKS
        for task in range(first, tl.minimum(first + TASKS, tasks)):
            query = tl.load(queries + task * entries + entry, mask=inside, other=0.0)
            # What is not finite in a query does not reach a domain without rows.
            query = tl.where((end > start) | (wrong != 0), query.to(tl.float64), 0.0)
            place = (task * domains + domain) * tl.num_programs(1) + block
            tl.store(sums + place, tl.sum(tl.where(inside, gradient * query, 0.0)))
    else:
        tl.store(sums + domain.to(tl.int64) * entries + entry, gradient.to(tl.float32), mask=inside)


@dataclass(frozen=True)
class _Slots:
    """What the first kernel leaves to the second.

    Attributes
    ----------
    gradients : float32 Tensor [ranges + m - 1, k_out, k_in]
    status : int32 Tensor [ranges]
        The bits of what each range found wrong.
    rows_per_range : int
    """

    gradients: Tensor
    status: Tensor
    rows_per_range: int


def refusal(arguments: ProjectedArguments) -> str | None:
    """Return why the kernels cannot take these factors, or None. Every number of rows k is taken."""
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
        Where wrong offsets and orders are noted that the host must not read; by default `error_flag` on a GPU. With
        one, CPU tensors are checked as those on a GPU are, by the kernels.

    Returns
    -------
    float64 Tensor [n, m]

    Raises
    ------
    ValueError
        If offsets, order or codes, where the host may read them, are wrong.
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


def projected_domain_gradients(
    input: Tensor,
    grad_output: Tensor,
    offsets: Tensor,
    output_factor: Tensor,
    input_factor: Tensor,
    dims: tuple[int, int],
    scale: float,
    order: Tensor | None,
    flag: Tensor | None = None,
) -> Tensor:
    """Compute ``tikmix_fast.ops.projected_domain_gradients``, without waiting for a GPU.

    Parameters
    ----------
    input, grad_output, offsets, output_factor, input_factor, scale, order
        As in `ProjectedArguments`.
    dims : tuple of int
        k_out and k_in.
    flag : int32 Tensor [1], optional
        As in `projected_group_influence`.

    Returns
    -------
    float32 Tensor [m, k_out, k_in]

    Raises
    ------
    ValueError
        If offsets, order or codes, where the host may read them, are wrong.
    """
    queries = input.new_empty(0, *dims)
    arguments, flag = _prepare(
        ProjectedArguments(input, grad_output, offsets, queries, output_factor, input_factor, scale, order), flag
    )
    gradients = input.new_empty(len(offsets) - 1, *dims, dtype=torch.float32)
    if gradients.numel():
        _reduce(arguments, _fill_slots(arguments), flag, None, gradients)
    elif input.device.type == "cuda":
        return mark_errors(gradients, arguments.offsets, arguments.order, len(input))
    return gradients


def _prepare(arguments: ProjectedArguments, flag: Tensor | None) -> tuple[ProjectedArguments, Tensor]:
    """Check the rows as far as the host may, and bring the arguments to where the kernels read them."""
    input, grad_output, offsets, queries, output_factor, input_factor, scale, order = arguments
    rows, device = len(input), input.device
    if flag is None and device.type == "cuda":
        flag = error_flag(device)
        offsets = device_offsets(offsets, rows, device)
    elif flag is None:
        domain_bounds(offsets, rows)
        check_order(order, rows)
        for factor, dim in ((output_factor, queries.shape[1]), (input_factor, queries.shape[2])):
            factor_matrix(factor, dim, factor.dtype)  # raises where a code is no row; on a GPU its column counts as 0
        flag = torch.zeros(1, dtype=torch.int32, device=device)
    order = None if order is None else order.contiguous()
    if INTERPRETED:  # whose arithmetic of bfloat16 is wrong
        input, grad_output, queries, output_factor, input_factor = (
            tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            for tensor in (input, grad_output, queries, output_factor, input_factor)
        )
    offsets = offsets.contiguous()
    return (
        ProjectedArguments(input, grad_output, offsets, queries, output_factor, input_factor, scale, order),
        flag,
    )


def _product_dtype(rows: Tensor, factor: Tensor) -> torch.dtype:
    """Return in which dtype rows meet a factor: their own if its entries are integers, exact in every dtype."""
    return torch.promote_types(rows.dtype, factor.dtype) if factor.dtype.is_floating_point else rows.dtype


def _tile(dim: int) -> int:
    return min(max(int(triton.next_power_of_2(dim)), _SMALLEST_TILE), _LARGEST_TILE)


def _candidates(device: torch.device, tile: int, *, exact: bool) -> tuple[Blocks, ...]:
    """Return the blocks to try for a tile's larger side; exact where a product is one of float32."""
    if device.type != "cuda":
        return _OF_INTERPRETER
    kind = "float" if exact else "wgmma" if capability(device)[0] in (9, 10) else "mma"
    return _BLOCKS[kind, max(tile, 64)]


def _fill_slots(arguments: ProjectedArguments) -> _Slots:
    """Run the first kernel with the blocks that suit it best."""
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
    _walk_rows[(ranges, tiles)](
        input,
        grad_output,
        offsets,
        order,
        output_factor,
        input_factor,
        slots,
        status,
        rows,
        rows_per_range,
        grad_output.shape[1],
        input.shape[1],
        domains,
        k_out,
        k_in,
        *input.stride(),
        *grad_output.stride(),
        *_factor_strides(output_factor),
        *_factor_strides(input_factor),
        HAS_ORDER=order is not None,
        INPUT_DTYPE=TRITON_DTYPES[dtypes[0]],
        GRAD_DTYPE=TRITON_DTYPES[dtypes[1]],
        PRECISION=precision(torch.float32),
        # Three products of tensor cores: the projections keep float32's precision, at a hundredth of their cost.
        LAST_PRECISION="tf32x3" if both_16_bit else precision(torch.float32),
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        K_OUT=_tile(k_out),
        K_IN=_tile(k_in),
        STAGES=blocks.stages,
        OFFSETS_BLOCK=_OFFSETS_BLOCK,
        num_warps=blocks.warps,
    )
    return _Slots(slots, status, rows_per_range)


def _factor_strides(factor: Tensor) -> tuple[int, int]:
    """Return the strides of rows and columns; codes have no rows."""
    row_stride, column_stride = (0, *factor.stride())[-2:]
    return row_stride, column_stride


def _reduce(arguments: ProjectedArguments, slots: _Slots, flag: Tensor, queries: Tensor | None, sums: Tensor) -> None:
    """Run the second kernel."""
    domains = len(arguments.offsets) - 1
    entries = slots.gradients[0].numel()
    tasks = 0 if queries is None else len(queries)
    grid = (domains, triton.cdiv(entries, _ENTRIES_BLOCK), max(triton.cdiv(tasks, _TASKS_PER_PROGRAM), 1))
    _sum_slots[grid](
        slots.gradients,
        slots.status,
        arguments.offsets,
        queries,
        sums,
        flag,
        len(arguments.input),
        slots.rows_per_range,
        len(slots.status),
        domains,
        tasks,
        entries,
        arguments.scale,
        WITH_QUERIES=queries is not None,
        TASKS=_TASKS_PER_PROGRAM,
        BLOCK=_ENTRIES_BLOCK,
        STATUS_BLOCK=_STATUS_BLOCK,
    )
