"""The projected op in one pass over the rows: neither they nor their projections go through device memory twice.

A program owns a range of rows and walks the domains in it. It takes a block of rows of one domain, sums
``x = X P_in^T`` and ``y = dY P_out^T`` in float32 registers, and adds ``y^T x`` to its k_out x k_in numbers. At the end
of the domain or of the range it writes those to a slot of their own. A second kernel sums a domain's slots in their
order, in float64, and multiplies the sum with the queries. There are no atomic additions, and T and the GPU alone
decide which program takes which rows, so every run gives the same bits.

The floor is reading the rows once: ``b T (I + O)`` bytes of b each. Through the L2 cache comes a dense factor, once per
block: ``k / (b block_rows)`` of the rows' own bytes. A CountSketch takes 4 bytes a column instead; its +-1 are made in
registers. The slots are ``8 (ranges + m) k_out k_in`` bytes, written and read. Products take ``2 T (I k_in + O k_out)``
operations. For 16-bit rows and k up to 128, a tensor core takes less time than the bytes. Beyond 128, tiles of 128 x
128 of the gradient read the rows once each. A block ends where its domain does, so a domain with far fewer rows than a
block costs as much as a whole block.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["sum_slots", "walk_rows"]


@triton.jit
def _project(
    matrix,
    columns,
    row,
    valid,
    factor,
    first_row,
    dim,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return ``matrix[row] @ P[first_row : first_row + DIM].T`` in float32, 0 where a row is not valid."""
    span = tl.arange(0, COLUMNS).to(tl.int64)
    factor_row = first_row + tl.arange(0, DIM)
    pointers = matrix.data + row[:, None] * matrix.strides[0] + span[None, :] * matrix.strides[1]
    factor_pointers = factor + span
    if factor.dtype.element_ty != tl.int32:
        factor_pointers = factor_pointers[None, :] + factor_row.to(tl.int64)[:, None] * columns
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
        pointers += COLUMNS * tl.cast(matrix.strides[1], tl.int64)
        factor_pointers += COLUMNS
    return sums


@triton.jit
def _read_offsets(offsets, domains, row, row_count):
    """Return the domain of a row, and 1 if the offsets are wrong, else 0."""
    domain = 0
    wrong = 0
    for first in range(0, domains, 128):
        entry = first + tl.arange(0, 128)
        known = entry < domains
        start = tl.load(offsets + entry, mask=known, other=0)
        end = tl.load(offsets + entry + 1, mask=known, other=row_count)
        domain += tl.sum((known & (end <= row)).to(tl.int32))
        broken = (end < start) | ((entry == 0) & (start != 0)) | ((entry == domains - 1) & (end != row_count))
        wrong |= tl.max((known & broken).to(tl.int32))
    return domain, wrong


@triton.jit
def _places(order, row, stop, row_count, ROWS: tl.constexpr):
    """Return where the rows from ``row`` on lie, which come before ``stop``, and 2 if order is wrong, else 0."""
    place = row + tl.arange(0, ROWS)
    valid = place < stop
    wrong = 0
    if order is not None:
        place = tl.load(order + place, mask=valid, other=0)
        wrong = 2 * tl.max((valid & ((place < 0) | (place >= row_count))).to(tl.int32))
        place = tl.minimum(tl.maximum(place, 0), row_count - 1)
    return place, valid, wrong


@triton.jit
def walk_rows(
    rows,
    output_factor,
    input_factor,
    offsets,
    slots,
    status,
    row_count,
    rows_per_range,
    domains,
    k_out,
    k_in,
    INPUT_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    LAST_PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K_OUT: tl.constexpr,
    K_IN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sum ``y^T x`` over one range of rows for one tile of the gradient, domain by domain, each into a slot.

    Domain j's part of range p goes to slot p + j. No other part has this slot: as p grows, j does not shrink.
    """
    part = tl.program_id(0)
    top = tl.program_id(1) // tl.cdiv(k_in, K_IN) * K_OUT
    left = tl.program_id(1) % tl.cdiv(k_in, K_IN) * K_IN
    row = part.to(tl.int64) * rows_per_range
    last = tl.minimum(row + rows_per_range, row_count)
    domain, wrong = _read_offsets(offsets, domains, row, row_count)
    k_out_entry = top + tl.arange(0, K_OUT)
    k_in_entry = left + tl.arange(0, K_IN)
    gradient = tl.zeros([K_OUT, K_IN], tl.float32)
    while row < last:
        # Rows that wrong offsets leave over belong to a domain after the last one.
        end = tl.load(offsets + domain + 1, mask=domain < domains, other=row_count)
        stop = tl.minimum(tl.maximum(end, row), tl.minimum(last, row + ROWS))
        if stop > row:
            place, valid, wrong_order = _places(rows.order, row, stop, row_count, ROWS)
            wrong |= wrong_order
            x = _project(
                rows.input, rows.width, place, valid, input_factor, left, k_in,
                INPUT_DTYPE, PRECISION, ROWS, COLUMNS, K_IN, STAGES,
            )  # fmt: skip
            y = _project(
                rows.grad_output, rows.height, place, valid, output_factor, top, k_out,
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
def sum_slots(
    slots,
    status,
    offsets,
    queries,
    sums,
    flag,
    row_count,
    rows_per_range,
    ranges,
    tasks,
    entries,
    scale: tl.float64,
    TASKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum a domain's slots in float64, for some entries of the gradient, and multiply the sum with the queries.

    With queries ``sums`` is [n, m, blocks of entries]. Without, it is the gradient itself, [m, entries]. If the first
    kernel found offsets or order wrong, everything is NaN and the flag says why.
    """
    domain = tl.program_id(0)
    block = tl.program_id(1)
    wrong = 0
    for first in range(0, ranges, 128):
        entry = first + tl.arange(0, 128)
        bits = tl.load(status + entry, mask=entry < ranges, other=0)
        wrong |= tl.max(bits & 1) | tl.max(bits & 2)
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
    if queries is not None:
        first = tl.program_id(2).to(tl.int64) * TASKS
        for task in range(first, tl.minimum(first + TASKS, tasks)):
            query = tl.load(queries + task * entries + entry, mask=inside, other=0.0)
            # A query that is not finite does not reach a domain without rows.
            query = tl.where((end > start) | (wrong != 0), query.to(tl.float64), 0.0)
            place = (task * tl.num_programs(0) + domain) * tl.num_programs(1) + block
            tl.store(sums + place, tl.sum(tl.where(inside, gradient * query, 0.0)))
    else:
        tl.store(sums + domain.to(tl.int64) * entries + entry, gradient.to(tl.float32), mask=inside)
