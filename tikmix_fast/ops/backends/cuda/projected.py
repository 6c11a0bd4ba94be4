"""The projected calls in one kernel that reads every row once."""

from __future__ import annotations

import torch
from torch import Tensor

from tikmix_fast.ops.backends.cuda import native
from tikmix_fast.ops.common.device_checks import device_offsets, error_flag, mark_errors
from tikmix_fast.ops.common.projected_checks import ProjectedArguments

__all__ = ["projected_domain_gradients", "projected_group_influence", "refusal"]

# As csrc/cuda/problem.h numbers the elements of a factor: the floating dtypes, then these.
_FACTOR_CODES = {**native.CODES, torch.int8: 3, torch.int32: 4}
_MOST_DIM = 128


def refusal(arguments: ProjectedArguments) -> str | None:
    """Return why the kernel cannot take these factors, or None."""
    if max(arguments.queries.shape[1:]) > _MOST_DIM:
        return f"k_out and k_in are {tuple(arguments.queries.shape[1:])}, and the kernel takes up to {_MOST_DIM}"
    for name in ("output_factor", "input_factor"):
        dtype = getattr(arguments, name).dtype
        # Integers are exact in the rows' dtype. Other entries would be rounded here, and were not for the queries.
        if dtype not in (torch.int8, torch.int32, arguments.input.dtype):
            return f"{name} is {dtype}, neither drawn integers nor of the rows' {arguments.input.dtype}"
    return None


def projected_group_influence(arguments: ProjectedArguments) -> Tensor:
    """Compute ``tikmix_fast.ops.projected_group_influence``."""
    values, _ = _project(arguments, with_gradients=False)
    return values


def projected_domain_gradients(arguments: ProjectedArguments) -> Tensor:
    """Compute ``tikmix_fast.ops.projected_domain_gradients``; only the shape of the queries is read."""
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
        multiprocessors = native.multiprocessors(device)
        plan = native.module.plan_projected(device=torch.cuda.current_device(), sizes=(rows, k_out, k_in))
        dim, _, splits = plan
        output_matrix = _matrix(output_factor, k_out, dim, input.dtype)
        input_matrix = _matrix(input_factor, k_in, dim, input.dtype)
        partials = input.new_empty(tasks * domains * splits, dtype=torch.float32)
        slots = input.new_empty((domains + splits) * k_out * k_in if with_gradients else 0, dtype=torch.float32)
        native.module.projected_group_influence(
            multiprocessors=multiprocessors,
            sizes=(rows, height, width, domains, tasks),
            dims=(k_out, k_in),
            plan=plan,
            element=native.CODES[input.dtype],
            input=native.rows_argument(input),
            grad_output=native.rows_argument(grad_output),
            offsets=offsets.data_ptr(),
            order=0 if order is None else order.data_ptr(),
            queries=queries.data_ptr(),
            matrices=(output_matrix.data_ptr(), input_matrix.data_ptr()),
            scale=scale,
            workspace=(partials.data_ptr(), slots.data_ptr()),
            values=values.data_ptr(),
            gradients=gradients.data_ptr(),
            flag=error_flag(device).data_ptr(),
            stream=native.stream(device),
        )
    return values, gradients


def _matrix(factor: Tensor, dim: int, padded_dim: int, dtype: torch.dtype) -> Tensor:
    """Write a factor out as the kernel reads it: padded with rows of zeros, each row a multiple of 16 bytes."""
    columns = factor.shape[-1]
    stride = -(-columns // 8) * 8
    matrix = factor.new_empty(padded_dim, stride, dtype=dtype)
    factor = factor.contiguous()
    native.module.write_factor(
        multiprocessors=native.multiprocessors(factor.device),
        factor=(factor.data_ptr(), _FACTOR_CODES[factor.dtype], dim, columns),
        matrix=(matrix.data_ptr(), native.CODES[dtype], padded_dim, stride),
        stream=native.stream(factor.device),
    )
    return matrix
