"""One kernel: a program forms a tile of a domain's gradient and takes its products while it is in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tikmix_fast.ops.backends.triton.configs import Tile, choose, multiprocessors, tile_configs
from tikmix_fast.ops.backends.triton.gradient import (
    PARTIAL_BYTES,
    TRITON_DTYPES,
    Call,
    accumulate_rows,
    count_below,
    descriptors,
    dot_dtype,
    finish,
    is_describable,
    partial_sums,
    precision,
    prepare,
    tile_origin,
)
from tikmix_fast.ops.common.checks import Arguments

__all__ = ["choose_splits", "group_influence"]

# What a domain costs in a tile, in rows: filling the pipeline again, and a product with one query. Predicted.
_DOMAIN_ROWS = 64
_PRODUCT_ROWS = 64
_MOST_SPLITS = 16


@triton.jit(do_not_specialize=["rows", "domains", "tasks", "splits"])
def _fused(
    input,
    grad_output,
    input_tiles,
    grad_tiles,
    query_tiles,
    order,
    offsets,
    queries,
    partials,
    grad_weight,
    totals,
    status,
    rows,
    height,
    width,
    domains,
    tasks,
    splits,
    input_stride_t,
    input_stride_i,
    grad_stride_t,
    grad_stride_o,
    query_stride_n,
    query_stride_o,
    query_stride_i,
    weight_stride_o,
    weight_stride_i,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERY_STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles = tl.cdiv(height, BLOCK_O) * tl.cdiv(width, BLOCK_I)
    items = tiles * splits
    if tl.load(status) != 0:
        items = 0
    for item in range(program, items, programs):
        split = (item // tiles).to(tl.int64)
        top, left = tile_origin(item % tiles, height, width, BLOCK_O, BLOCK_I, GROUP=8)
        o = (top + tl.arange(0, BLOCK_O)).to(tl.int64)
        i = (left + tl.arange(0, BLOCK_I)).to(tl.int64)
        inside = (o < height)[:, None] & (i < width)[None, :]
        first_row = split * rows // splits
        last_row = (split + 1) * rows // splits
        if grad_weight is not None:
            total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        first_domain = count_below(offsets + 1, domains, first_row + 1)
        last_domain = count_below(offsets, domains, last_row)
        for domain in range(first_domain, last_domain):
            start = tl.maximum(tl.load(offsets + domain), first_row)
            end = tl.minimum(tl.load(offsets + domain + 1), last_row)
            sums = accumulate_rows(
                start,
                end,
                top,
                left,
                input,
                grad_output,
                input_tiles,
                grad_tiles,
                order,
                height,
                width,
                input_stride_t,
                input_stride_i,
                grad_stride_t,
                grad_stride_o,
                BLOCK_T,
                BLOCK_O,
                BLOCK_I,
                DTYPE,
                PRECISION,
            )
            if grad_weight is not None:
                total += sums
            # Whoever owns the slot is the only one to add to it, one tile after the other.
            slot = partials + tl.cast(domain, tl.int64) * programs + program
            products = tl.where(start < end, tasks, 0)
            for task in tl.range(0, products, num_stages=QUERY_STAGES):
                task_slot = slot + tl.cast(task, tl.int64) * domains * programs
                before = tl.load(task_slot)
                if query_tiles is not None:
                    query = query_tiles.load([task, top, left]).reshape(BLOCK_O, BLOCK_I)
                else:
                    tile_of_queries = queries + tl.cast(task, tl.int64) * query_stride_n
                    tile_of_queries += o[:, None] * query_stride_o + i[None, :] * query_stride_i
                    query = tl.load(tile_of_queries, mask=inside, other=0.0)
                tl.store(task_slot, before + tl.sum(sums * query.to(tl.float32)))
        if totals is not None:
            place = totals + (split * height + o[:, None]) * width + i[None, :]
            tl.store(place, total, mask=inside)
        elif grad_weight is not None:
            place = grad_weight + o[:, None] * weight_stride_o + i[None, :] * weight_stride_i
            before = tl.load(place, mask=inside, other=0.0)
            tl.store(place, (before.to(tl.float32) + total).to(before.dtype), mask=inside)


@triton.jit(do_not_specialize=["splits"])
def _add_totals(
    totals, grad_weight, status, height, width, splits, weight_stride_o, weight_stride_i, BLOCK: tl.constexpr
):
    across = tl.cdiv(width, BLOCK)
    o = (tl.program_id(0) // across).to(tl.int64)
    i = (tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = i < tl.where(tl.load(status) == 0, width, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(totals + (split * height + o) * width + i, mask=inside, other=0.0)
    place = grad_weight + o * weight_stride_o + i * weight_stride_i
    before = tl.load(place, mask=inside, other=0.0)
    tl.store(place, (before.to(tl.float32) + total).to(before.dtype), mask=inside)


def choose_splits(tiles: int, programs: int, rows: int, domains: int, tasks: int, most: int) -> int:
    """Return into how many ranges the rows are split, so that programs are not idle and little is done twice.

    Parameters
    ----------
    tiles, programs : int
        Tiles of the gradient, and programs that run side by side.
    rows, domains, tasks : int
        T, m and n. A domain in two ranges is multiplied with the queries twice.
    most : int
        Bound on the result, for memory.

    Examples
    --------
    >>> [choose_splits(tiles, 132, 16384, 4, 9, 16) for tiles in (1024, 64, 4)]
    [1, 2, 16]
    """

    def cost(splits: int) -> float:
        rounds = -(-tiles * splits // programs)
        overlapping = domains / splits + (splits > 1)
        return rounds * (rows / splits + overlapping * (_DOMAIN_ROWS + _PRODUCT_ROWS * tasks))

    return min(range(1, max(most, 1) + 1), key=cost)


def group_influence(
    arguments: Arguments, *, tile: Tile | None = None, splits: int | None = None, flag: Tensor | None = None
) -> Tensor:
    """Compute ``tikmix_fast.ops.group_influence`` in one kernel, without memory that grows with the layer.

    Parameters
    ----------
    arguments : Arguments
        Tensors on one GPU, or on the CPU in Triton's interpreter.
    tile : Tile, optional
        By default the fastest that was found; see `tikmix_fast.ops.backends.triton.configs`.
    splits : int, optional
        By default `choose_splits`. Each range has its total gradient in memory where ``grad_weight`` is given.
    flag : int32 Tensor [1], optional
        As `prepare`.

    Returns
    -------
    float64 Tensor [n, m]
        NaN, with ``grad_weight`` untouched, where offsets or order on the GPU are wrong.
    """
    call = prepare(arguments, flag)
    tasks, height, width = call.queries.shape
    programs = multiprocessors(call.input.device)
    slots = max(1, min(programs, PARTIAL_BYTES // (4 * max(tasks * call.domains, 1))))
    partials = partial_sums(call, slots)
    if len(call.input) and height and width:
        if tile is None:
            tile = _fastest_tile(call, slots, splits)
        _run(call, partials, tile, splits)
    return finish(arguments, call, partials)


def _fastest_tile(call: Call, slots: int, splits: int | None) -> Tile:
    dtype, device = dot_dtype(call), call.input.device
    candidates = tile_configs(device, dtype.itemsize, call.grad_weight is not None)

    def run(tile: Tile) -> None:
        weight = None if call.grad_weight is None else torch.zeros_like(call.grad_weight)
        _run(call._replace(grad_weight=weight), partial_sums(call, slots), tile, splits)

    return choose(("fused", *call.kind()), device, candidates, run)


def _run(call: Call, partials: Tensor, tile: Tile, splits: int | None) -> None:
    input, grad_output, offsets, queries, order, grad_weight, status = call
    tasks, domains, slots = partials.shape
    rows, height, width = len(input), *queries.shape[1:]
    tiles = triton.cdiv(height, tile.block_o) * triton.cdiv(width, tile.block_i)
    if splits is None:
        in_memory = _MOST_SPLITS if grad_weight is None else PARTIAL_BYTES // (4 * height * width)
        most = min(_MOST_SPLITS, rows // (4 * tile.block_t), in_memory)
        splits = choose_splits(tiles, slots, rows, domains, tasks, most)
    totals = None
    if grad_weight is not None and splits > 1:
        totals = torch.empty(splits, height, width, dtype=torch.float32, device=input.device)
    weight_strides = (0, 0) if grad_weight is None else grad_weight.stride()
    dtype = dot_dtype(call)
    input_tiles, grad_tiles = descriptors(call, tile)
    query_tiles = None
    if is_describable(queries):
        query_tiles = TensorDescriptor.from_tensor(queries, [1, tile.block_o, tile.block_i])
    _fused[(slots,)](
        input,
        grad_output,
        input_tiles,
        grad_tiles,
        query_tiles,
        order,
        offsets,
        queries,
        partials,
        grad_weight,
        totals,
        status,
        rows,
        height,
        width,
        domains,
        tasks,
        splits,
        *input.stride(),
        *grad_output.stride(),
        *queries.stride(),
        *weight_strides,
        BLOCK_T=tile.block_t,
        BLOCK_O=tile.block_o,
        BLOCK_I=tile.block_i,
        DTYPE=TRITON_DTYPES[dtype],
        PRECISION=precision(dtype),
        QUERY_STAGES=1 if query_tiles is None else 2,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if totals is not None:
        _add_totals[(height * triton.cdiv(width, 1024),)](
            totals, grad_weight, status, height, width, splits, *weight_strides, BLOCK=1024
        )
