"""One kernel: a program forms a tile of a domain's gradient and multiplies it while it is in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tikmix_fast.ops.backends.triton.configs import Tile, choose, multiprocessors, tile_configs
from tikmix_fast.ops.backends.triton.gradient import (
    Call,
    Strided,
    accumulate_rows,
    add_to,
    count_below,
    descriptors,
    dot_dtype,
    finish,
    is_describable,
    partial_sums,
    prepare,
    sum_of_splits,
    tile_options,
    tile_origin,
)
from tikmix_fast.ops.common.checks import Arguments

__all__ = ["choose_splits", "group_influence"]

# What a domain costs in a tile, in rows: filling the pipeline again, and one product with a query. Predicted.
_DOMAIN_ROWS = 64
_PRODUCT_ROWS = 64
_MOST_SPLITS = 16
# The most that the totals of all splits may take.
_TOTALS_BYTES = 32 << 20


@triton.jit
def _query_tile(query_tiles, queries, task, top, left, o, i, inside, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    if query_tiles is not None:
        return query_tiles.load([task, top, left]).reshape(BLOCK_O, BLOCK_I)
    else:  # noqa: RET505 (this condition is the compiler's)
        place = queries.data + tl.cast(task, tl.int64) * queries.strides[0]
        place += o[:, None] * queries.strides[1] + i[None, :] * queries.strides[2]
        return tl.load(place, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["domains", "tasks", "splits"])
def _fused(
    rows,
    input_tiles,
    grad_tiles,
    query_tiles,
    queries,
    offsets,
    partials,
    grad_weight,
    totals,
    status,
    domains,
    tasks,
    splits,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles = tl.cdiv(rows.height, BLOCK_O) * tl.cdiv(rows.width, BLOCK_I)
    items = tiles * splits
    if tl.load(status) != 0:
        items = 0
    row_count = tl.load(offsets + domains)
    for item in range(program, items, programs):
        split = (item // tiles).to(tl.int64)
        top, left = tile_origin(item % tiles, rows.height, rows.width, BLOCK_O, BLOCK_I, GROUP=8)
        o = (top + tl.arange(0, BLOCK_O)).to(tl.int64)
        i = (left + tl.arange(0, BLOCK_I)).to(tl.int64)
        inside = (o < rows.height)[:, None] & (i < rows.width)[None, :]
        first_row = split * row_count // splits
        last_row = (split + 1) * row_count // splits
        if grad_weight.data is not None:
            total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        first_domain = count_below(offsets + 1, domains, first_row + 1)
        last_domain = count_below(offsets, domains, last_row)
        for domain in range(first_domain, last_domain):
            start = tl.maximum(tl.load(offsets + domain), first_row)
            end = tl.minimum(tl.load(offsets + domain + 1), last_row)
            sums = accumulate_rows(
                rows, input_tiles, grad_tiles, start, end, top, left, BLOCK_T, BLOCK_O, BLOCK_I, PRECISION
            )
            if grad_weight.data is not None:
                total += sums
            # Only this program adds to its slot, one tile after the other.
            slot = partials + tl.cast(domain, tl.int64) * programs + program
            products = tl.where(start < end, tasks, 0)
            for task in tl.range(0, products, num_stages=1 if query_tiles is None else 2):
                task_slot = slot + tl.cast(task, tl.int64) * domains * programs
                before = tl.load(task_slot)
                query = _query_tile(query_tiles, queries, task, top, left, o, i, inside, BLOCK_O, BLOCK_I)
                tl.store(task_slot, before + tl.sum(sums * query.to(tl.float32)))
        if totals is not None:
            place = totals + (split * rows.height + o[:, None]) * rows.width + i[None, :]
            tl.store(place, total, mask=inside)
        elif grad_weight.data is not None:
            place = grad_weight.data + o[:, None] * grad_weight.strides[0] + i[None, :] * grad_weight.strides[1]
            add_to(place, total, inside)


@triton.jit(do_not_specialize=["splits"])
def _add_totals(totals, grad_weight, status, height, width, splits, BLOCK: tl.constexpr):
    across = tl.cdiv(width, BLOCK)
    o = (tl.program_id(0) // across).to(tl.int64)
    i = (tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = i < tl.where(tl.load(status) == 0, width, 0)
    size = tl.cast(height, tl.int64) * width
    total = sum_of_splits(totals, size, splits, o * width + i, inside, BLOCK)
    add_to(grad_weight.data + o * grad_weight.strides[0] + i * grad_weight.strides[1], total, inside)


def choose_splits(tiles: int, programs: int, rows: int, domains: int, tasks: int, most: int) -> int:
    """Return into how many ranges to split the rows, so that no program idles and few products are taken twice.

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
        By default the fastest in a trial; see `tikmix_fast.ops.backends.triton.configs`.
    splits : int, optional
        Ranges of rows, by default `choose_splits`. With ``grad_weight``, each range has its own total in memory.
    flag : int32 Tensor [1], optional
        As in `prepare`.

    Returns
    -------
    float64 Tensor [n, m]
        NaN, with ``grad_weight`` untouched, where offsets or order on the GPU are wrong.
    """
    call = prepare(arguments, flag)
    partials = partial_sums(call, multiprocessors(call.input.device))
    if min(len(call.input), *call.queries.shape[1:]) > 0:
        _run(call, partials, _fastest_tile(call, partials, splits) if tile is None else tile, splits)
    return finish(arguments, call, partials)


def _fastest_tile(call: Call, partials: Tensor, splits: int | None) -> Tile:
    device = call.input.device
    candidates = tile_configs(device, dot_dtype(call).itemsize, call.grad_weight is not None)

    def run(tile: Tile) -> None:
        _run(call.with_own_total(), torch.zeros_like(partials), tile, splits)

    return choose(("fused", *call.kind()), device, candidates, run)


def _run(call: Call, partials: Tensor, tile: Tile, splits: int | None) -> None:
    tasks, domains, programs = partials.shape
    rows, (height, width) = len(call.input), call.queries.shape[1:]
    if splits is None:
        tiles = triton.cdiv(height, tile.block_o) * triton.cdiv(width, tile.block_i)
        affordable = _MOST_SPLITS if call.grad_weight is None else _TOTALS_BYTES // (4 * height * width)
        most = min(_MOST_SPLITS, rows // (4 * tile.block_t), affordable)
        splits = choose_splits(tiles, programs, rows, domains, tasks, most)
    totals = None
    if call.grad_weight is not None and splits > 1:
        totals = torch.empty(splits, height, width, dtype=torch.float32, device=call.input.device)
    query_tiles = None
    if is_describable(call.queries):
        query_tiles = TensorDescriptor.from_tensor(call.queries, [1, tile.block_o, tile.block_i])
    grad_weight = Strided.of(call.grad_weight)
    _fused[(programs,)](
        call.rows(),
        *descriptors(call, tile),
        query_tiles,
        Strided.of(call.queries),
        call.offsets,
        partials,
        grad_weight,
        totals,
        call.status,
        domains,
        tasks,
        splits,
        **tile_options(call, tile),
    )
    if totals is not None:
        grid = (height * triton.cdiv(width, 1024),)
        _add_totals[grid](totals, grad_weight, call.status, height, width, splits, BLOCK=1024)
