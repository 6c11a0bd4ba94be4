"""``tikmix_fast.ops.group_influence`` on a CPU: in the native kernel, or row by row where that costs less."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from tikmix_fast.ops.backends.cpu import native
from tikmix_fast.ops.backends.cpu.cost import count_costs
from tikmix_fast.ops.common.checks import Arguments, check_order, domain_bounds

__all__ = ["empty_panels", "fused", "group_influence", "pack_queries", "packed_argument", "plain_argument", "row_wise"]

# Row by row, this many rows at a time: their products with a query are read again while they are in cache.
_ROWS_AT_A_TIME = 1024


def plain_argument(queries: Tensor) -> tuple[int, int, int, int, int, int]:
    """Return queries [n, O, I] as the native module takes them."""
    code = native.DTYPE_CODES[queries.dtype]
    return queries.data_ptr(), code, queries.shape[0], 0, queries.stride(0), queries.stride(1)


def packed_argument(panels: Tensor) -> tuple[int, int, int, int, int, int]:
    """Return packed queries as the native module takes them."""
    return panels.data_ptr(), native.DTYPE_CODES[panels.dtype], panels.shape[2], 1, 0, 0


def packed_layout(instruction_set: str, queries: Tensor) -> tuple[torch.Size, torch.dtype]:
    """Return shape and dtype of packed queries."""
    tasks, height, width = queries.shape
    rows, columns, code = native.module.packed_layout(
        instruction_set=instruction_set, dtype=native.DTYPE_CODES[queries.dtype]
    )
    return torch.Size((-(-width // columns), -(-height // rows), tasks, rows, columns)), native.DTYPES[code]


def _are_panels(panels: Tensor, instruction_set: str, queries: Tensor) -> bool:
    alike = (panels.shape, panels.dtype) == packed_layout(instruction_set, queries)
    return alike and panels.device.type == "cpu" and panels.is_contiguous()


def empty_panels(queries: Tensor) -> Tensor:
    """Return memory for `pack_queries`; an empty vector if the kernel does not take these queries."""
    if native.unavailable() or queries.device.type != "cpu" or queries.dtype not in native.DTYPE_CODES:
        return queries.new_empty(0)
    shape, dtype = packed_layout(native.chosen_instruction_set(), queries)
    return queries.new_empty(shape, dtype=dtype)


def pack_queries(queries: Tensor) -> Tensor:
    """Copy the queries [n, O, I] into the order in which the kernel reads them.

    Returns
    -------
    Tensor [column micro-tiles, row micro-tiles, n, micro-tile rows, micro-tile columns]
        The shape identifies the layout. An empty vector if the kernel does not take these queries.
    """
    panels = empty_panels(queries)
    if panels.dim() == 1:
        return panels
    queries = queries if queries.stride(-1) == 1 else queries.contiguous()
    native.module.pack_queries(
        instruction_set=native.chosen_instruction_set(),
        threads=torch.get_num_threads(),
        height=queries.shape[1],
        width=queries.shape[2],
        queries=plain_argument(queries),
        panels=panels.data_ptr(),
    )
    return panels


def group_influence(arguments: Arguments) -> Tensor:
    """Compute ``tikmix_fast.ops.group_influence`` in whichever way costs less."""
    bounds = domain_bounds(arguments.offsets, len(arguments.input))
    check_order(arguments.order, len(arguments.input))
    pairs = native.chosen_instruction_set() == "avx512_bf16" and (
        arguments.input.dtype == arguments.grad_output.dtype == torch.bfloat16
    )
    domains = sum(start < end for start, end in pairwise(bounds))
    _, height, width, _, tasks = arguments.sizes
    with_total = arguments.grad_weight is not None
    costs = count_costs(bounds[-1], height, width, domains, tasks, with_total=with_total, pairs=pairs)
    return row_wise(arguments, bounds) if costs.cheapest() == "row_wise" else fused(arguments)


def row_wise(arguments: Arguments, bounds: list[int]) -> Tensor:
    """Sum ``<grad_output[t], queries[i] input[t]>`` over the rows of every domain, without forming a gradient.

    Parameters
    ----------
    arguments : Arguments
        With offsets and order as `group_influence` checked them.
    bounds : list of int [m + 1]
        The offsets.

    Returns
    -------
    float64 Tensor [n, m]

    Notes
    -----
    Rows and queries are multiplied in float32: in 16 bits their products would lose digits or overflow. The total
    gradient, if wanted, comes from `fused` without queries.
    """
    input, grad_output, _, queries, _, order, grad_weight = arguments
    per_row = input.new_empty(len(queries), len(input), dtype=torch.float64)
    for i, query in enumerate(queries):
        transposed = query.float().T
        for start in range(0, len(input), _ROWS_AT_A_TIME):
            rows = slice(start, start + _ROWS_AT_A_TIME)
            products = input[rows].float() @ transposed
            per_row[i, rows] = torch.linalg.vecdot(products.double(), grad_output[rows].double())
    if grad_weight is not None:
        everything = torch.tensor([0, len(input)], device="cpu")
        fused(arguments._replace(offsets=everything, queries=queries[:0], panels=None))
    if order is not None:
        per_row = per_row[:, order]
    sizes = torch.tensor(bounds, device=input.device).diff()
    return per_row.new_zeros(len(queries), len(sizes)).index_add_(1, torch.repeat_interleave(sizes), per_row)


def fused(arguments: Arguments) -> Tensor:
    """Compute it in the native kernel, in one pass; `group_influence` has checked offsets and order."""
    input, grad_output, offsets, queries, panels, order, grad_weight = arguments
    instruction_set = native.chosen_instruction_set()
    # The kernel takes any strides of the other tensors. It reads the queries m times, so their columns must be
    # contiguous.
    fits = panels is not None and _are_panels(panels, instruction_set, queries)
    if queries.stride(-1) != 1 and not fits:
        queries = queries.contiguous()
    offsets = offsets.contiguous()
    order = None if order is None else order.contiguous()
    rows, height, width, domains, tasks = arguments.sizes
    values = torch.empty(tasks, domains, dtype=torch.float64, device="cpu")
    # The kernel adds to float32, block by block. A 16-bit grad_weight is rounded once, at the end.
    total = grad_weight if grad_weight is None or grad_weight.dtype == torch.float32 else grad_weight.float()
    native.module.group_influence(
        instruction_set=instruction_set,
        threads=torch.get_num_threads(),
        sizes=(rows, height, width, domains),
        input=native.matrix_argument(input),
        grad_output=native.matrix_argument(grad_output),
        queries=packed_argument(panels) if fits and panels is not None else plain_argument(queries),
        offsets=offsets.data_ptr(),
        order=0 if order is None else order.data_ptr(),
        grad_weight=(0, 0, 0) if total is None else (total.data_ptr(), total.stride(0), total.stride(1)),
        values=values.data_ptr(),
    )
    if grad_weight is not None and total is not None:
        if total is grad_weight:
            increment_version(grad_weight)  # autograd did not see the write
        else:
            grad_weight.copy_(total)
    return values
