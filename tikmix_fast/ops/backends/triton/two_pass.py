"""Two kernels in turn: one writes the domains' gradients of a panel of the layer, one multiplies them with the queries.

A panel is small enough to stay in the L2 cache in between. Every query is read once instead of once per domain.
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
    Call,
    Strided,
    accumulate_rows,
    add_to,
    count_below,
    descriptors,
    dot_dtype,
    finish,
    partial_sums,
    prepare,
    sum_of_splits,
    tile_options,
    tile_origin,
)
from tikmix_fast.ops.common.checks import Arguments

__all__ = ["group_influence", "panel_shape"]

PANEL_BYTES = 32 << 20
"""The most that the gradients of all domains in one panel may take, unless a single tile of each takes more.

The total takes up to one more tile for each multiprocessor.
"""

_PROGRAMS_PER_MULTIPROCESSOR = 4  # of the second kernel, whose programs are small
_MOST_SPLITS = 64


class _Panel(NamedTuple):
    """A part of the layer's weights."""

    top: int
    left: int
    height: int
    width: int


@triton.jit(do_not_specialize=["domains", "splits"])
def _write_panel(
    rows,
    input_tiles,
    grad_tiles,
    offsets,
    place,
    panel,
    totals,
    status,
    domains,
    splits,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(place.height, BLOCK_O) * tl.cdiv(place.width, BLOCK_I)
    items = tiles * splits
    if tl.load(status) != 0:
        items = 0
    row_count = tl.load(offsets + domains)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        split = (item // tiles).to(tl.int64)
        top, left = tile_origin(item % tiles, place.height, place.width, BLOCK_O, BLOCK_I, GROUP=8)
        o = (top + tl.arange(0, BLOCK_O)).to(tl.int64)
        i = (left + tl.arange(0, BLOCK_I)).to(tl.int64)
        inside = (o < place.height)[:, None] & (i < place.width)[None, :]
        within_panel = o[:, None] * place.width + i[None, :]
        panel_size = tl.cast(place.height, tl.int64) * place.width
        if totals is not None:
            total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        # A domain belongs to the split in whose range of rows it starts; empty ones may start after the last row.
        first_domain = count_below(offsets, domains, split * row_count // splits)
        last_domain = count_below(offsets, domains, (split + 1) * row_count // splits + (split + 1) // splits)
        for domain in range(first_domain, last_domain):
            sums = accumulate_rows(
                rows,
                input_tiles,
                grad_tiles,
                tl.load(offsets + domain),
                tl.load(offsets + domain + 1),
                place.top + top,
                place.left + left,
                BLOCK_T,
                BLOCK_O,
                BLOCK_I,
                PRECISION,
            )
            if totals is not None:
                total += sums
            target = panel + tl.cast(domain, tl.int64) * panel_size + within_panel
            tl.store(target, sums.to(panel.dtype.element_ty), mask=inside)
        if totals is not None:
            tl.store(totals + split * panel_size + within_panel, total, mask=inside)


@triton.jit(do_not_specialize=["domains", "tasks", "splits"])
def _multiply_panel(
    place,
    panel,
    queries,
    partials,
    totals,
    grad_weight,
    status,
    domains,
    tasks,
    splits,
    BLOCK: tl.constexpr,
    DOMAINS: tl.constexpr,
    TASKS: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    panel_size = tl.cast(place.height, tl.int64) * place.width
    domain = (tl.program_id(1) * DOMAINS + tl.arange(0, DOMAINS)).to(tl.int64)
    task = (tl.program_id(2) * TASKS + tl.arange(0, TASKS)).to(tl.int64)
    across = tl.cdiv(place.width, BLOCK)
    # Every program has a range of neighbouring blocks, so that it reads on where it read before.
    share = tl.cdiv(place.height * across, programs)
    last = tl.minimum((program + 1) * share, place.height * across)
    if tl.load(status) != 0:
        last = 0
    products = tl.zeros([DOMAINS, TASKS], tl.float32)
    for block in range(program * share, last):
        o = tl.cast(block // across, tl.int64)
        i = (block % across * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        gradients = tl.load(
            panel + domain[:, None] * panel_size + o * place.width + i[None, :],
            mask=(domain < domains)[:, None] & (i < place.width)[None, :],
            other=0.0,
        )
        query = tl.load(
            queries.data
            + task[None, :] * queries.strides[0]
            + o * queries.strides[1]
            + i[:, None] * queries.strides[2],
            mask=(i < place.width)[:, None] & (task < tasks)[None, :],
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
                inside = i < place.width
                total = sum_of_splits(totals, panel_size, splits, o * place.width + i, inside, BLOCK)
                add_to(grad_weight.data + o * grad_weight.strides[0] + i * grad_weight.strides[1], total, inside)


class _Plan(NamedTuple):
    """The configurations of both kernels."""

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
    arguments, tile, flag
        As in the fused way; the result too.
    splits : int, optional
        Groups of domains in a panel, by default as many as keep all programs busy.

    Notes
    -----
    Gradients are rounded to bfloat16 before they meet the queries where rows and queries are all bfloat16.
    """
    call = prepare(arguments, flag)
    partials = partial_sums(call, _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(call.input.device))
    if min(len(call.input), *call.queries.shape[1:]) > 0:
        _run(call, partials, _plan(call, partials, tile), splits)
    return finish(arguments, call, partials)


def _plan(call: Call, partials: Tensor, tile: Tile | None) -> _Plan:
    dtypes = {call.input.dtype, call.grad_output.dtype, call.queries.dtype}
    panel_dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
    device = call.input.device
    tiles = tile_configs(device, dot_dtype(call).itemsize, call.grad_weight is not None) if tile is None else (tile,)
    products = product_configs(device, panel_dtype.itemsize)
    plans = [_Plan(tile, products[0], panel_dtype) for tile in tiles]
    plans += [_Plan(tiles[0], product, panel_dtype) for product in products[1:]]

    def run(plan: _Plan) -> None:
        _run(call.with_own_total(), torch.zeros_like(partials), plan, None)

    return choose(("two_pass", *call.kind()), device, plans, run) if tile is None else plans[0]


def _run(call: Call, partials: Tensor, plan: _Plan, splits: int | None) -> None:
    tile, product, panel_dtype = plan
    tasks, domains, slots = partials.shape
    height, width = call.queries.shape[1:]
    device = call.input.device
    bytes_of_total = 0 if call.grad_weight is None else 4
    tall, wide = panel_shape(height, width, tile, domains * panel_dtype.itemsize + bytes_of_total)
    programs = multiprocessors(device)
    tiles = triton.cdiv(tall, tile.block_o) * triton.cdiv(wide, tile.block_i)
    if splits is None:
        splits = min(max(programs // tiles, 1), domains, _MOST_SPLITS)
    panel = torch.empty(domains * tall * wide, dtype=panel_dtype, device=device)
    totals = None
    if call.grad_weight is not None:
        totals = torch.empty(splits * tall * wide, dtype=torch.float32, device=device)
    most = 64 if panel_dtype.itemsize == 2 else 32  # without the tensor cores, a thread can hold less
    group_of_domains, group_of_tasks = (min(max(triton.next_power_of_2(size), 16), most) for size in (domains, tasks))
    grid = slots, triton.cdiv(domains, group_of_domains), max(triton.cdiv(tasks, group_of_tasks), 1)
    rows, (input_tiles, grad_tiles) = call.rows(), descriptors(call, tile)
    for top in range(0, height, tall):
        for left in range(0, width, wide):
            place = _Panel(top, left, min(tall, height - top), min(wide, width - left))
            part = slice(top, top + tall), slice(left, left + wide)
            _write_panel[(min(tiles * splits, programs),)](
                rows,
                input_tiles,
                grad_tiles,
                call.offsets,
                place,
                panel,
                totals,
                call.status,
                domains,
                splits,
                **tile_options(call, tile),
            )
            _multiply_panel[grid](
                place,
                panel,
                Strided.of(call.queries[(slice(None), *part)]),
                partials,
                totals,
                Strided.of(None if call.grad_weight is None else call.grad_weight[part]),
                call.status,
                domains,
                tasks,
                splits,
                BLOCK=product.block,
                DOMAINS=group_of_domains,
                TASKS=group_of_tasks,
                num_warps=product.warps,
                num_stages=product.stages,
            )
