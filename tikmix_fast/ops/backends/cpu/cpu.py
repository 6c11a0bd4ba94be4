"""The native CPU backend: hands addresses, sizes and strides to `tikmix_fast._cpu`."""

from __future__ import annotations

import os
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from tikmix_fast.ops.backends.cpu.cost import count_costs
from tikmix_fast.ops.backends.cpu.row_wise import row_wise_influence
from tikmix_fast.ops.common.checks import Arguments, check_order, domain_bounds
from tikmix_fast.ops.common.projected_checks import ProjectedArguments

try:  # after torch, so that both use the one OpenMP runtime that torch brings
    from tikmix_fast import _cpu
except ImportError as error:
    _missing: str | None = f"the native module tikmix_fast._cpu cannot be imported ({error}); reinstall tikmix_fast"
else:
    _missing = None

__all__ = [
    "DTYPE_CODES",
    "chosen_instruction_set",
    "empty_panels",
    "fused",
    "group_influence",
    "instruction_sets",
    "matrix_argument",
    "pack_queries",
    "refusal",
    "row_wise",
    "unavailable",
]

INSTRUCTION_SET_VARIABLE = "TIKMIX_FAST_CPU_ISA"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


def unavailable() -> str | None:
    """Return why the native kernel cannot be used here, or None."""
    return _missing


def refusal(arguments: Arguments | ProjectedArguments) -> str | None:
    """Return why the native kernel cannot take this call, or None."""
    for name in ("input", "grad_output", "queries", "grad_weight"):
        tensor: Tensor | None = getattr(arguments, name, None)
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}, not on the CPU"
        if tensor.dtype not in DTYPE_CODES:
            return f"{name} is {tensor.dtype}, none of float32, bfloat16 and float16"
    return None


def instruction_sets() -> list[str]:
    """Return the instruction sets that were compiled in and that this processor has, best first."""
    return [] if _missing else _cpu.instruction_sets()


def chosen_instruction_set() -> str:
    """Return the best instruction set, or the one that the environment variable forces."""
    usable = instruction_sets()
    forced = os.environ.get(INSTRUCTION_SET_VARIABLE)
    if not forced:
        return usable[0]
    if forced not in usable:
        raise ValueError(
            f"{INSTRUCTION_SET_VARIABLE} must be one of {', '.join(usable)} on this machine; got {forced!r}"
        )
    return forced


def matrix_argument(tensor: Tensor) -> tuple[int, int, int, int]:
    """Return address, dtype code and strides, as the native module takes a matrix."""
    row_stride, column_stride = tensor.stride()[-2:]
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], row_stride, column_stride


def _plain(queries: Tensor) -> tuple[int, int, int, int, int, int]:
    return (
        queries.data_ptr(),
        DTYPE_CODES[queries.dtype],
        queries.shape[0],
        0,
        queries.stride(0),
        queries.stride(1),
    )


def _packed(panels: Tensor) -> tuple[int, int, int, int, int, int]:
    return panels.data_ptr(), DTYPE_CODES[panels.dtype], panels.shape[2], 1, 0, 0


def _panels(instruction_set: str, queries: Tensor) -> tuple[torch.Size, torch.dtype]:
    """Return shape and dtype of packed queries."""
    tasks, height, width = queries.shape
    rows, columns, code = _cpu.packed_layout(instruction_set=instruction_set, dtype=DTYPE_CODES[queries.dtype])
    return torch.Size((-(-width // columns), -(-height // rows), tasks, rows, columns)), _DTYPES[code]


def _are_panels(panels: Tensor, instruction_set: str, queries: Tensor) -> bool:
    alike = (panels.shape, panels.dtype) == _panels(instruction_set, queries)
    return alike and panels.device.type == "cpu" and panels.is_contiguous()


def empty_panels(queries: Tensor) -> Tensor:
    """Return memory for `pack_queries`, of no element if the kernel does not take these queries."""
    if _missing or queries.device.type != "cpu" or queries.dtype not in DTYPE_CODES:
        return queries.new_empty(0)
    shape, dtype = _panels(chosen_instruction_set(), queries)
    return queries.new_empty(shape, dtype=dtype)


def pack_queries(queries: Tensor) -> Tensor:
    """Return the queries [n, O, I] in the order in which the kernel reads them, or nothing if it does not take them.

    The shape, [column micro-tiles, row micro-tiles, n, micro-tile rows, micro-tile columns], tells the layout.
    """
    panels = empty_panels(queries)
    if panels.dim() == 1:
        return panels
    instruction_set = chosen_instruction_set()
    queries = queries if queries.stride(-1) == 1 else queries.contiguous()
    _cpu.pack_queries(
        instruction_set=instruction_set,
        threads=torch.get_num_threads(),
        height=queries.shape[1],
        width=queries.shape[2],
        queries=_plain(queries),
        panels=panels.data_ptr(),
    )
    return panels


def group_influence(arguments: Arguments) -> Tensor:
    """Compute ``tikmix_fast.ops.group_influence`` the way that costs least."""
    bounds = domain_bounds(arguments.offsets, len(arguments.input))
    check_order(arguments.order, len(arguments.input))
    pairs = chosen_instruction_set() == "avx512_bf16" and (
        arguments.input.dtype == arguments.grad_output.dtype == torch.bfloat16
    )
    domains = sum(start < end for start, end in pairwise(bounds))
    tasks, height, width = arguments.queries.shape
    with_total = arguments.grad_weight is not None
    costs = count_costs(bounds[-1], height, width, domains, tasks, with_total=with_total, pairs=pairs)
    return row_wise(arguments, bounds) if costs.cheapest() == "row_wise" else fused(arguments, len(bounds) - 1)


def row_wise(arguments: Arguments, bounds: list[int]) -> Tensor:
    """Compute it row by row, and the total gradient besides, without queries; `group_influence` has checked both."""
    input, grad_output, _, queries, _, order, grad_weight = arguments
    values = row_wise_influence(input, grad_output, bounds, queries, order)
    if grad_weight is not None:
        everything = torch.tensor([0, len(input)], device="cpu")
        fused(arguments._replace(offsets=everything, queries=queries[:0], panels=None), 1)
    return values


def fused(arguments: Arguments, domains: int) -> Tensor:
    """Compute it in the native kernel, in one pass; arguments as `group_influence` checked."""
    input, grad_output, offsets, queries, panels, order, grad_weight = arguments
    instruction_set = chosen_instruction_set()
    # The kernel takes any strides of the other tensors; queries are read m times, so their columns must be contiguous.
    fits = panels is not None and _are_panels(panels, instruction_set, queries)
    if queries.stride(-1) != 1 and not fits:
        queries = queries.contiguous()
    offsets = offsets.contiguous()
    order = None if order is None else order.contiguous()
    tasks, height, width = queries.shape
    values = torch.empty(tasks, domains, dtype=torch.float64, device="cpu")
    # A 16-bit grad_weight is rounded once, at the end: the kernel adds to float32, block by block.
    total = grad_weight if grad_weight is None or grad_weight.dtype == torch.float32 else grad_weight.float()
    _cpu.group_influence(
        instruction_set=instruction_set,
        threads=torch.get_num_threads(),
        sizes=(len(input), height, width, domains),
        input=matrix_argument(input),
        grad_output=matrix_argument(grad_output),
        queries=_packed(panels) if fits and panels is not None else _plain(queries),
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
