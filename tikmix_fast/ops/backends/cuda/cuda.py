"""The native CUDA backend: hands addresses, sizes and strides to `tikmix_fast._cuda`, on the current stream."""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from tikmix_fast.ops.backends.cuda import grouped_mm as two_pass
from tikmix_fast.ops.backends.gpu_cost import count_gpu_costs
from tikmix_fast.ops.common.checks import Arguments
from tikmix_fast.ops.common.device_checks import device_offsets, error_flag, mark_errors
from tikmix_fast.ops.common.projected_checks import ProjectedArguments

try:
    from tikmix_fast import _cuda
except ImportError as error:
    _missing: str | None = f"not compiled in ({error}); a build with TIKMIX_FAST_CUDA=ON and nvcc on PATH compiles it"
else:
    _missing = None

__all__ = [
    "empty_panels",
    "fused",
    "group_influence",
    "pack_queries",
    "projected_domain_gradients",
    "projected_group_influence",
    "refusal",
    "unavailable",
]

KERNEL_VARIABLE = "TIKMIX_FAST_CUDA_KERNEL"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_HALF = (torch.bfloat16, torch.float16)
# As csrc/cuda/problem.h numbers what a factor may be: the floating dtypes, then these.
_FACTOR_CODES = {**_CODES, torch.int8: 3, torch.int32: 4}
_MOST_PROJECTED_DIM = 128
# Rows are copied 16 bytes at a time.
_ALIGNMENT = 16

Kernel = Literal["mma", "wgmma"]


def unavailable() -> str | None:
    """Return why the kernels cannot be used on the current device, or None."""
    if _missing:
        return _missing
    if not torch.cuda.is_available():
        return f"no CUDA device; the module was built for {_cuda.architectures} with CUDA {_toolkit()}"
    return _unsupported(torch.device("cuda", torch.cuda.current_device()))


def _toolkit() -> str:
    return ".".join(map(str, _cuda.toolkit_version))


def _unsupported(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    built = [(int(each.rstrip("a")[:-1]), int(each.rstrip("a")[-1])) for each in _cuda.architectures.split()]
    # Machine code runs on later devices of its generation, intermediate code of the last one on all that come after.
    if any(of == major and at_least <= minor for of, at_least in built) or built[-1] <= (major, minor):
        return None
    return (
        f"built for {_cuda.architectures}, and {device} is of {major}.{minor}; "
        f"build with TIKMIX_FAST_CUDA_ARCHITECTURES={major}{minor}"
    )


def refusal(arguments: Arguments | ProjectedArguments) -> str | None:
    """Return why the kernels cannot take this call, or None."""
    input, grad_output = arguments.input, arguments.grad_output
    if input.device.type != "cuda":
        return f"input is on {input.device}, not on a GPU"
    unsupported = _unsupported(input.device)
    if unsupported:
        return unsupported
    if input.dtype != grad_output.dtype or input.dtype not in _HALF:
        return f"input and grad_output are {input.dtype} and {grad_output.dtype}, not both bfloat16 or float16"
    for name, rows in (("input", input), ("grad_output", grad_output)):
        if not _are_aligned(rows):
            return f"{name} has rows that do not start at multiples of 16 bytes: strides {rows.stride()}"
    if arguments.queries.dtype not in _CODES:
        return f"queries is {arguments.queries.dtype}, none of float32, bfloat16 and float16"
    if isinstance(arguments, ProjectedArguments):
        return _projected_refusal(arguments)
    return None


def _projected_refusal(arguments: ProjectedArguments) -> str | None:
    if max(arguments.queries.shape[1:]) > _MOST_PROJECTED_DIM:
        return (
            f"k_out and k_in are {tuple(arguments.queries.shape[1:])}, and the kernel takes up to {_MOST_PROJECTED_DIM}"
        )
    for name in ("output_factor", "input_factor"):
        dtype = getattr(arguments, name).dtype
        # Integers are exact in the rows' dtype; anything else would be rounded, and the queries' projection was not.
        if dtype not in (torch.int8, torch.int32, arguments.input.dtype):
            return f"{name} is {dtype}, neither drawn integers nor of the rows' {arguments.input.dtype}"
    return None


def _are_aligned(rows: Tensor) -> bool:
    size = rows.element_size()
    apart = rows.stride(0) >= rows.shape[1] and rows.stride(0) * size % _ALIGNMENT == 0
    unit = rows.stride(1) == 1 or rows.shape[1] == 1
    return unit and (apart or len(rows) <= 1) and rows.data_ptr() % _ALIGNMENT == 0


def _rows_argument(rows: Tensor) -> tuple[int, int]:
    """Return address and row stride; of a single row, a stride that a second one could have."""
    whole = -(-rows.shape[1] * rows.element_size() // _ALIGNMENT) * _ALIGNMENT // rows.element_size()
    return rows.data_ptr(), rows.stride(0) if len(rows) > 1 else whole


def _kernel(device: torch.device) -> Kernel:
    """Return the best kernel of a device, or the one that the environment variable forces."""
    best: Kernel = "wgmma" if _cuda.has_wgmma and torch.cuda.get_device_capability(device) == (9, 0) else "mma"
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
    rows, columns, warps, loads, per_load = _cuda.packed_layout(kernel=kernel, element=_CODES[dtype])
    tiles = -(-height // rows) * -(-width // columns)
    return torch.Size((tiles, tasks, warps, loads, 32, per_load)), dtype


def _are_panels(panels: Tensor, kernel: Kernel, queries: Tensor) -> bool:
    alike = (panels.shape, panels.dtype) == _panels(kernel, queries)
    return alike and panels.device == queries.device and panels.is_contiguous()


def empty_panels(queries: Tensor) -> Tensor:
    """Return memory for `pack_queries`, of no element if no kernel here takes these queries."""
    if unavailable() or _unsupported(queries.device) or queries.dtype not in _CODES:
        return queries.new_empty(0)
    shape, dtype = _panels(_kernel(queries.device), queries)
    return queries.new_empty(shape, dtype=dtype)


def pack_queries(queries: Tensor) -> Tensor:
    """Return the queries [n, O, I] in the order of the kernel's registers, or nothing if no kernel takes them.

    bfloat16 stays bfloat16, everything else becomes float32.
    """
    panels = empty_panels(queries)
    if panels.dim() == 1 or panels.numel() == 0:
        return panels
    tasks, height, width = queries.shape
    task_stride, row_stride, column_stride = queries.stride()
    with torch.cuda.device(queries.device):
        _cuda.pack_queries(
            kernel=_kernel(queries.device),
            sizes=(tasks, height, width),
            queries=(queries.data_ptr(), _CODES[queries.dtype], task_stride, row_stride, column_stride),
            panels=(panels.data_ptr(), _CODES[panels.dtype]),
            stream=_stream(queries.device),
        )
    return panels


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def group_influence(arguments: Arguments) -> Tensor:
    """Compute ``tikmix_fast.ops.group_influence`` the way that is counted to cost least."""
    if two_pass.refusal(arguments) is None:
        tasks, height, width = arguments.queries.shape
        costs = count_gpu_costs(
            len(arguments.input),
            height,
            width,
            len(arguments.offsets) - 1,
            tasks,
            with_total=arguments.grad_weight is not None,
            kernel="cuda",
            capability=torch.cuda.get_device_capability(arguments.input.device),
        )
        if costs.cheapest() == "two_pass":
            return two_pass.group_influence(arguments)
    return fused(arguments)


def fused(arguments: Arguments) -> Tensor:
    """Compute it in the native kernel, in one pass; nothing that the host would have to wait for is read."""
    input, grad_output, offsets, queries, panels, order, grad_weight = arguments
    device = input.device
    rows, domains = len(input), len(offsets) - 1
    tasks, height, width = queries.shape
    offsets = device_offsets(offsets, rows, device)
    if min(rows, height, width, domains) == 0 or (tasks == 0 and grad_weight is None):
        return mark_errors(input.new_zeros(tasks, domains, dtype=torch.float64), offsets, order, rows)
    kernel = _kernel(device)
    if panels is None or not _are_panels(panels, kernel, queries):
        panels = pack_queries(queries)
    order = None if order is None else order.contiguous()
    # What the kernel does not add to gets the sum afterwards.
    total = grad_weight
    if grad_weight is not None and not _takes_total(grad_weight):
        total = grad_weight.new_zeros(height, width, dtype=torch.float32)
    with torch.cuda.device(device):
        multiprocessors = _multiprocessors(device)
        splits, items, split_elements = _cuda.plan(
            kernel=kernel, sizes=(rows, height, width), multiprocessors=multiprocessors
        )
        partials = input.new_empty(tasks * domains * items, dtype=torch.float32)
        split_totals = input.new_empty(split_elements if total is not None else 0, dtype=torch.float32)
        values = input.new_empty(tasks, domains, dtype=torch.float64)
        _cuda.group_influence(
            kernel=kernel,
            multiprocessors=multiprocessors,
            sizes=(rows, height, width, domains, tasks),
            splits=splits,
            element=_CODES[input.dtype],
            input=_rows_argument(input),
            grad_output=_rows_argument(grad_output),
            offsets=offsets.data_ptr(),
            order=0 if order is None else order.data_ptr(),
            queries=(panels.data_ptr(), _CODES[panels.dtype]),
            grad_weight=(0, 0, 0) if total is None else (total.data_ptr(), _CODES[total.dtype], total.stride(0)),
            workspace=(partials.data_ptr(), split_totals.data_ptr()),
            values=values.data_ptr(),
            flag=error_flag(device).data_ptr(),
            stream=_stream(device),
        )
    if grad_weight is not None and total is not None:
        if total is grad_weight:
            increment_version(grad_weight)  # autograd did not see the write
        else:
            grad_weight += total
    return values


def _takes_total(grad_weight: Tensor) -> bool:
    return grad_weight.stride(1) == 1 and grad_weight.dtype in (torch.float32, torch.bfloat16)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def projected_group_influence(arguments: ProjectedArguments) -> Tensor:
    """Compute ``tikmix_fast.ops.projected_group_influence`` in one kernel that reads every row once."""
    values, _ = _project(arguments, with_gradients=False)
    return values


def projected_domain_gradients(arguments: ProjectedArguments) -> Tensor:
    """Compute ``tikmix_fast.ops.projected_domain_gradients`` [m, k_out, k_in]; the queries only tell the sizes."""
    _, gradients = _project(arguments._replace(queries=arguments.queries[:0]), with_gradients=True)
    return gradients


def _project(arguments: ProjectedArguments, *, with_gradients: bool) -> tuple[Tensor, Tensor]:
    input, grad_output, offsets, queries, output_factor, input_factor, scale, order = arguments
    device = input.device
    rows, domains = len(input), len(offsets) - 1
    tasks, k_out, k_in = queries.shape
    height, width = grad_output.shape[1], input.shape[1]
    offsets = device_offsets(offsets, rows, device)
    values = input.new_zeros(tasks, domains, dtype=torch.float64)
    gradients = input.new_zeros(domains if with_gradients else 0, k_out, k_in, dtype=torch.float32)
    if min(rows, height, width, domains, k_out, k_in) == 0 or (tasks == 0 and not with_gradients):
        return mark_errors(values, offsets, order, rows), gradients
    order = None if order is None else order.contiguous()
    queries = queries.float().contiguous()
    with torch.cuda.device(device):
        multiprocessors = _multiprocessors(device)
        plan = _cuda.plan_projected(device=torch.cuda.current_device(), sizes=(rows, k_out, k_in))
        dim, _, splits = plan
        output_matrix = _matrix(output_factor, k_out, dim, input.dtype)
        input_matrix = _matrix(input_factor, k_in, dim, input.dtype)
        partials = input.new_empty(tasks * domains * splits, dtype=torch.float32)
        slots = input.new_empty((domains + splits) * k_out * k_in if with_gradients else 0, dtype=torch.float32)
        _cuda.projected_group_influence(
            multiprocessors=multiprocessors,
            sizes=(rows, height, width, domains, tasks),
            dims=(k_out, k_in),
            plan=plan,
            element=_CODES[input.dtype],
            input=_rows_argument(input),
            grad_output=_rows_argument(grad_output),
            offsets=offsets.data_ptr(),
            order=0 if order is None else order.data_ptr(),
            queries=queries.data_ptr(),
            matrices=(output_matrix.data_ptr(), input_matrix.data_ptr()),
            scale=scale,
            workspace=(partials.data_ptr(), slots.data_ptr()),
            values=values.data_ptr(),
            gradients=gradients.data_ptr(),
            flag=error_flag(device).data_ptr(),
            stream=_stream(device),
        )
    return values, gradients


def _matrix(factor: Tensor, dim: int, padded_dim: int, dtype: torch.dtype) -> Tensor:
    """Write a factor out as the kernel reads it: rows of zeros below, columns to a multiple of 16 bytes."""
    columns = factor.shape[-1]
    stride = -(-columns // 8) * 8
    matrix = factor.new_empty(padded_dim, stride, dtype=dtype)
    factor = factor.contiguous()
    _cuda.write_factor(
        multiprocessors=_multiprocessors(factor.device),
        factor=(factor.data_ptr(), _FACTOR_CODES[factor.dtype], dim, columns),
        matrix=(matrix.data_ptr(), _CODES[dtype], padded_dim, stride),
        stream=_stream(factor.device),
    )
    return matrix
