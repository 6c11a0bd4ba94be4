"""Two kernels in turn: one writes the domains' gradients of a panel of the layer, one multiplies them with the queries.

A panel is small enough to stay in the L2 cache between the two, and every query is read once instead of once per
domain.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tikmix_fast.ops.backends.triton.configs import (
    Product,
    Tile,
    choose,
    multiprocessors,
    product_configs,
    tile_configs,
)
from tikmix_fast.ops.backends.triton.gradient import (
    PARTIAL_BYTES,
    TRITON_DTYPES,
    Call,
    accumulate_rows,
    count_below,
    descriptors,
    dot_dtype,
    finish,
    partial_sums,
    precision,
    prepare,
    tile_origin,
)
from tikmix_fast.ops.common.checks import Arguments

__all__ = ["group_influence", "panel_shape"]

PANEL_BYTES = 32 << 20
"""What the gradients of all domains in one panel may take, unless a single tile of each takes more.

The total takes up to a tile for each multiprocessor besides.
"""

_PROGRAMS_PER_MULTIPROCESSOR = 4  # of the second kernel, whose programs are small
_MOST_SPLITS = 64


@triton.jit(do_not_specialize=["rows", "domains", "splits"])
def _write_panel(
    input,
    grad_output,
    input_tiles,
    grad_tiles,
    order,
    offsets,
    panel,
    totals,
    status,
    rows,
    height,
    width,
    domains,
    splits,
    panel_top,
    panel_left,
    panel_height,
    panel_width,
    input_stride_t,
    input_stride_i,
    grad_stride_t,
    grad_stride_o,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(panel_height, BLOCK_O) * tl.cdiv(panel_width, BLOCK_I)
    items = tiles * splits
    if tl.load(status) != 0:
        items = 0
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        split = (item // tiles).to(tl.int64)
        top, left = tile_origin(item % tiles, panel_height, panel_width, BLOCK_O, BLOCK_I, GROUP=8)
        o = (top + tl.arange(0, BLOCK_O)).to(tl.int64)
        i = (left + tl.arange(0, BLOCK_I)).to(tl.int64)
        inside = (o < panel_height)[:, None] & (i < panel_width)[None, :]
        within_panel = o[:, None] * panel_width + i[None, :]
        panel_size = tl.cast(panel_height, tl.int64) * panel_width
        if totals is not None:
            total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        # A domain belongs to the split in whose range of rows it starts; empty ones may start after the last row.
        first_domain = count_below(offsets, domains, split * rows // splits)
        last_domain = count_below(offsets, domains, (split + 1) * rows // splits + (split + 1) // splits)
        for domain in range(first_domain, last_domain):
            sums = accumulate_rows(
                tl.load(offsets + domain),
                tl.load(offsets + domain + 1),
                panel_top + top,
                panel_left + left,
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
            if totals is not None:
                total += sums
            place = panel + tl.cast(domain, tl.int64) * panel_size + within_panel
            tl.store(place, sums.to(panel.dtype.element_ty), mask=inside)
        if totals is not None:
            tl.store(totals + split * panel_size + within_panel, total, mask=inside)


@triton.jit(do_not_specialize=["domains", "tasks", "splits"])
def _multiply_panel(
    panel,
    queries,
    partials,
    totals,
    grad_weight,
    status,
    domains,
    tasks,
    splits,
    panel_height,
    panel_width,
    query_stride_n,
    query_stride_o,
    query_stride_i,
    weight_stride_o,
    weight_stride_i,
    BLOCK: tl.constexpr,
    DOMAINS: tl.constexpr,
    TASKS: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    panel_size = tl.cast(panel_height, tl.int64) * panel_width
    domain = (tl.program_id(1) * DOMAINS + tl.arange(0, DOMAINS)).to(tl.int64)
    task = (tl.program_id(2) * TASKS + tl.arange(0, TASKS)).to(tl.int64)
    across = tl.cdiv(panel_width, BLOCK)
    # Every program has a range of neighbouring blocks, so that it reads on where it read before.
    share = tl.cdiv(panel_height * across, programs)
    last = tl.minimum((program + 1) * share, panel_height * across)
    if tl.load(status) != 0:
        last = 0
    products = tl.zeros([DOMAINS, TASKS], tl.float32)
    for block in range(program * share, last):
        o = tl.cast(block // across, tl.int64)
        i = (block % across * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        gradients = tl.load(
            panel + domain[:, None] * panel_size + o * panel_width + i[None, :],
            mask=(domain < domains)[:, None] & (i < panel_width)[None, :],
            other=0.0,
        )
        query = tl.load(
            queries + task[None, :] * query_stride_n + o * query_stride_o + i[:, None] * query_stride_i,
            mask=(i < panel_width)[:, None] & (task < tasks)[None, :],
            other=0.0,
        )
        products = tl.dot(gradients, query.to(gradients.dtype), products, input_precision="ieee")
    slots = partials + (task[None, :] * domains + domain[:, None]) * programs + program
    cells = (domain < domains)[:, None] & (task < tasks)[None, :]
    tl.store(slots, tl.load(slots, mask=cells, other=0.0) + products, mask=cells)
    if totals is not None:  # noqa: SIM102 (this condition is the compiler's, the next one the program's)
        if tl.program_id(1) + tl.program_id(2) == 0:
            for block in range(program * share, last):
                o = tl.cast(block // across, tl.int64)
                i = (block % across * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
                total = tl.zeros([BLOCK], tl.float32)
                for split in range(splits):
                    part = totals + tl.cast(split, tl.int64) * panel_size + o * panel_width + i
                    total += tl.load(part, mask=i < panel_width, other=0.0)
                place = grad_weight + o * weight_stride_o + i * weight_stride_i
                before = tl.load(place, mask=i < panel_width, other=0.0)
                tl.store(place, (before.to(tl.float32) + total).to(before.dtype), mask=i < panel_width)


class _Plan(NamedTuple):
    tile: Tile
    product: Product
    dtype: torch.dtype  # of the panel


def panel_shape(height: int, width: int, tile: Tile, bytes_per_weight: int) -> tuple[int, int]:
    """Return height and width of the panels, in whole tiles except where the layer ends.

    All domains together have ``bytes_per_weight`` for each of the panel's weights.

    Examples
    --------
    >>> tile = Tile(128, 128, 64, 8, 4)
    >>> panel_shape(4096, 4096, tile, 26 * 2), panel_shape(4096, 4096, tile, 300 * 2), panel_shape(100, 64, tile, 16)
    ((128, 4096), (128, 384), (100, 64))
    """
    numbers = PANEL_BYTES // bytes_per_weight
    wide = max(min(numbers // tile.block_o, width + tile.block_i) // tile.block_i, 1) * tile.block_i
    tall = max(numbers // min(wide, width) // tile.block_o, 1) * tile.block_o
    return min(tall, height), min(wide, width)


def group_influence(
    arguments: Arguments, *, tile: Tile | None = None, splits: int | None = None, flag: Tensor | None = None
) -> Tensor:
    """Compute ``tikmix_fast.ops.group_influence`` panel by panel.

    Parameters
    ----------
    arguments : Arguments
        Tensors on one GPU, or on the CPU in Triton's interpreter.
    tile : Tile, optional
        By default the fastest that was found; see `tikmix_fast.ops.backends.triton.configs`.
    splits : int, optional
        Into how many groups the domains of a panel are split, by default as many as keep all programs busy.
    flag : int32 Tensor [1], optional
        As `prepare`.

    Returns
    -------
    float64 Tensor [n, m]
        NaN, with ``grad_weight`` untouched, where offsets or order on the GPU are wrong.

    Notes
    -----
    Gradients are rounded to bfloat16 before they meet the queries where rows and queries are all bfloat16.
    """
    call = prepare(arguments, flag)
    tasks, height, width = call.queries.shape
    programs = multiprocessors(call.input.device)
    slots = min(_PROGRAMS_PER_MULTIPROCESSOR * programs, PARTIAL_BYTES // (4 * max(tasks * call.domains, 1)))
    partials = partial_sums(call, max(slots, 1))
    if len(call.input) and height and width:
        _run(call, partials, _plan(call, partials.shape[2], tile), splits)
    return finish(arguments, call, partials)


def _plan(call: Call, slots: int, tile: Tile | None) -> _Plan:
    dtypes = {call.input.dtype, call.grad_output.dtype, call.queries.dtype}
    panel_dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
    device = call.input.device
    tiles = tile_configs(device, dot_dtype(call).itemsize, call.grad_weight is not None) if tile is None else (tile,)
    products = product_configs(device, panel_dtype.itemsize)
    plans = [_Plan(tile, products[0], panel_dtype) for tile in tiles]
    plans += [_Plan(tiles[0], product, panel_dtype) for product in products[1:]]

    def run(plan: _Plan) -> None:
        weight = None if call.grad_weight is None else torch.zeros_like(call.grad_weight)
        _run(call._replace(grad_weight=weight), partial_sums(call, slots), plan, None)

    return choose(("two_pass", *call.kind()), device, plans, run) if tile is None else plans[0]


def _run(call: Call, partials: Tensor, plan: _Plan, splits: int | None) -> None:
    input, grad_output, offsets, queries, order, grad_weight, status = call
    tile, product, panel_dtype = plan
    tasks, domains, slots = partials.shape
    rows, height, width = len(input), *queries.shape[1:]
    bytes_of_total = 0 if grad_weight is None else 4
    tall, wide = panel_shape(height, width, tile, domains * panel_dtype.itemsize + bytes_of_total)
    programs = multiprocessors(input.device)
    tiles = triton.cdiv(tall, tile.block_o) * triton.cdiv(wide, tile.block_i)
    if splits is None:
        splits = min(max(programs // tiles, 1), domains, _MOST_SPLITS)
    panel = torch.empty(domains * tall * wide, dtype=panel_dtype, device=input.device)
    totals = None
    if grad_weight is not None:
        totals = torch.empty(splits * tall * wide, dtype=torch.float32, device=input.device)
    dtype = dot_dtype(call)
    input_tiles, grad_tiles = descriptors(call, tile)
    most = 64 if panel_dtype.itemsize == 2 else 32  # without the tensor cores, a thread can hold less
    group_of_domains, group_of_tasks = (min(max(triton.next_power_of_2(size), 16), most) for size in (domains, tasks))
    grid = slots, triton.cdiv(domains, group_of_domains), max(triton.cdiv(tasks, group_of_tasks), 1)
    for top in range(0, height, tall):
        for left in range(0, width, wide):
            panel_height, panel_width = min(tall, height - top), min(wide, width - left)
            _write_panel[(min(tiles * splits, programs),)](
                input,
                grad_output,
                input_tiles,
                grad_tiles,
                order,
                offsets,
                panel,
                totals,
                status,
                rows,
                height,
                width,
                domains,
                splits,
                top,
                left,
                panel_height,
                panel_width,
                *input.stride(),
                *grad_output.stride(),
                BLOCK_T=tile.block_t,
                BLOCK_O=tile.block_o,
                BLOCK_I=tile.block_i,
                DTYPE=TRITON_DTYPES[dtype],
                PRECISION=precision(dtype),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
            part = None if grad_weight is None else grad_weight[top : top + panel_height, left : left + panel_width]
            _multiply_panel[grid](
                panel,
                queries[:, top : top + panel_height, left : left + panel_width],
                partials,
                totals,
                part,
                status,
                domains,
                tasks,
                splits,
                panel_height,
                panel_width,
                *queries.stride(),
                *((0, 0) if part is None else part.stride()),
                BLOCK=product.block,
                DOMAINS=group_of_domains,
                TASKS=group_of_tasks,
                num_warps=product.warps,
                num_stages=product.stages,
            )
