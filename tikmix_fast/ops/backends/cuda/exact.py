"""``tikmix_fast.ops.group_influence`` on a GPU: our kernel, or the vendor's grouped product where that costs less."""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from tikmix_fast.ops.backends.cuda import grouped_mm, native
from tikmix_fast.ops.common.checks import Arguments
from tikmix_fast.ops.common.device_checks import device_offsets, error_flag, mark_errors
from tikmix_fast.ops.common.gpu_cost import count_gpu_costs

__all__ = ["KERNEL_VARIABLE", "empty_panels", "fused", "group_influence", "pack_queries"]

KERNEL_VARIABLE = "TIKMIX_FAST_CUDA_KERNEL"

Kernel = Literal["mma", "wgmma"]


def _kernel(device: torch.device) -> Kernel:
    """Return the best kernel of a device, or the one that the environment variable forces."""
    best: Kernel = "wgmma" if native.module.has_wgmma and torch.cuda.get_device_capability(device) == (9, 0) else "mma"
    forced = os.environ.get(KERNEL_VARIABLE)
    if not forced:
        return best
    if forced not in {"mma", best}:
        raise ValueError(f"{KERNEL_VARIABLE} must be mma{' or wgmma' * (best == 'wgmma')} here; got {forced!r}")
    return "mma" if forced == "mma" else best


def _panels(kernel: Kernel, queries: Tensor) -> tuple[torch.Size, torch.dtype]:
    """Return shape and dtype of packed queries: tiles, tasks, warps, loads, lanes, numbers of a load."""
    dtype = torch.bfloat16 if queries.dtype == torch.bfloat16 else torch.float32
    tasks, height, width = queries.shape
    rows, columns, warps, loads, per_load = native.module.packed_layout(kernel=kernel, element=native.CODES[dtype])
    tiles = -(-height // rows) * -(-width // columns)
    return torch.Size((tiles, tasks, warps, loads, 32, per_load)), dtype


def _are_panels(panels: Tensor, kernel: Kernel, queries: Tensor) -> bool:
    alike = (panels.shape, panels.dtype) == _panels(kernel, queries)
    return alike and panels.device == queries.device and panels.is_contiguous()


def empty_panels(queries: Tensor) -> Tensor:
    """Return memory for `pack_queries`; an empty vector if no kernel here takes these queries."""
    if native.unavailable() or native.unsupported(queries.device) or queries.dtype not in native.CODES:
        return queries.new_empty(0)
    shape, dtype = _panels(_kernel(queries.device), queries)
    return queries.new_empty(shape, dtype=dtype)


def pack_queries(queries: Tensor) -> Tensor:
    """Copy the queries [n, O, I] into the order of the kernel's registers, see `empty_panels`.

    bfloat16 stays bfloat16; other dtypes become float32.
    """
    panels = empty_panels(queries)
    if panels.dim() == 1 or panels.numel() == 0:
        return panels
    tasks, height, width = queries.shape
    task_stride, row_stride, column_stride = queries.stride()
    with torch.cuda.device(queries.device):
        native.module.pack_queries(
            kernel=_kernel(queries.device),
            sizes=(tasks, height, width),
            queries=(queries.data_ptr(), native.CODES[queries.dtype], task_stride, row_stride, column_stride),
            panels=(panels.data_ptr(), native.CODES[panels.dtype]),
            stream=native.stream(queries.device),
        )
    return panels


def group_influence(arguments: Arguments) -> Tensor:
    """Compute ``tikmix_fast.ops.group_influence`` in whichever way costs less."""
    if grouped_mm.refusal(arguments) is None:
        costs = count_gpu_costs(
            *arguments.sizes,
            with_total=arguments.grad_weight is not None,
            kernel="cuda",
            capability=torch.cuda.get_device_capability(arguments.input.device),
        )
        if costs.cheapest() == "two_pass":
            return grouped_mm.group_influence(arguments)
    return fused(arguments)


def fused(arguments: Arguments) -> Tensor:
    """Compute it in the native kernel, in one pass. The host never waits for the device."""
    input, grad_output, offsets, queries, panels, order, grad_weight = arguments
    device = input.device
    rows, height, width, domains, tasks = arguments.sizes
    offsets = device_offsets(offsets, rows, device)
    if min(rows, height, width, domains) == 0 or (tasks == 0 and grad_weight is None):
        return mark_errors(input.new_zeros(tasks, domains, dtype=torch.float64), offsets, order, rows)
    kernel = _kernel(device)
    if panels is None or not _are_panels(panels, kernel, queries):
        panels = pack_queries(queries)
    order = None if order is None else order.contiguous()
    # A gradient that the kernel cannot add to gets the sum afterwards.
    total = grad_weight
    if grad_weight is not None and not _takes_total(grad_weight):
        total = grad_weight.new_zeros(height, width, dtype=torch.float32)
    with torch.cuda.device(device):
        multiprocessors = native.multiprocessors(device)
        splits, items, split_elements = native.module.plan(
            kernel=kernel, sizes=(rows, height, width), multiprocessors=multiprocessors
        )
        partials = input.new_empty(tasks * domains * items, dtype=torch.float32)
        split_totals = input.new_empty(split_elements if total is not None else 0, dtype=torch.float32)
        values = input.new_empty(tasks, domains, dtype=torch.float64)
        native.module.group_influence(
            kernel=kernel,
            multiprocessors=multiprocessors,
            sizes=(rows, height, width, domains, tasks),
            splits=splits,
            element=native.CODES[input.dtype],
            input=native.rows_argument(input),
            grad_output=native.rows_argument(grad_output),
            offsets=offsets.data_ptr(),
            order=0 if order is None else order.data_ptr(),
            queries=(panels.data_ptr(), native.CODES[panels.dtype]),
            grad_weight=(0, 0, 0) if total is None else (total.data_ptr(), native.CODES[total.dtype], total.stride(0)),
            workspace=(partials.data_ptr(), split_totals.data_ptr()),
            values=values.data_ptr(),
            flag=error_flag(device).data_ptr(),
            stream=native.stream(device),
        )
    if grad_weight is not None and total is not None:
        if total is grad_weight:
            increment_version(grad_weight)  # autograd did not see the write
        else:
            grad_weight += total
    return values


def _takes_total(grad_weight: Tensor) -> bool:
    return grad_weight.stride(1) == 1 and grad_weight.dtype in (torch.float32, torch.bfloat16)
