"""Projected group influence in each backend: the rows are projected, and the exact op takes what is left of them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from tikmix_fast.ops.backends import reference as reference_backend
from tikmix_fast.ops.backends.cpu import cpu as cpu_backend
from tikmix_fast.ops.backends.cpu.sketch import can_sketch, sketch_rows
from tikmix_fast.ops.common.checks import Arguments, check_order, domain_bounds
from tikmix_fast.ops.common.projected_checks import ProjectedArguments
from tikmix_fast.ops.common.projection import factor_matrix

__all__ = ["cpu", "domain_gradients", "project_rows", "reference"]


def reference(arguments: ProjectedArguments) -> Tensor:
    """Compute ``tikmix_fast.ops.projected_group_influence`` with both matrices written out, everything in float64."""
    input, grad_output, offsets, queries, output_factor, input_factor, scale, order = arguments
    small_input = input.double() @ factor_matrix(input_factor, queries.shape[2], torch.float64).T  # [T, k_in]
    small_grad = grad_output.double() @ factor_matrix(output_factor, queries.shape[1], torch.float64).T  # [T, k_out]
    return scale * reference_backend.group_influence(
        Arguments(small_input, small_grad, offsets, queries, panels=None, order=order, grad_weight=None)
    )


def cpu(arguments: ProjectedArguments) -> Tensor:
    """Compute ``tikmix_fast.ops.projected_group_influence`` with the native sketch, or torch's product if dense."""
    input, grad_output, offsets, queries, output_factor, input_factor, scale, order = arguments
    small_input = project_rows(input, input_factor, queries.shape[2])
    small_grad = project_rows(grad_output, output_factor, queries.shape[1])
    return scale * cpu_backend.group_influence(
        Arguments(small_input, small_grad, offsets, queries, panels=None, order=order, grad_weight=None)
    )


def domain_gradients(arguments: ProjectedArguments) -> Tensor:
    """Compute ``tikmix_fast.ops.projected_domain_gradients`` with torch's products, one domain at a time."""
    input, grad_output, offsets, queries, output_factor, input_factor, scale, order = arguments
    dims = queries.shape[1:]
    bounds = domain_bounds(offsets, input.shape[0])
    check_order(order, input.shape[0])
    small_input = project_rows(input, input_factor, dims[1]).float()
    small_grad = project_rows(grad_output, output_factor, dims[0]).float()
    if order is not None:
        small_input, small_grad = small_input[order], small_grad[order]
    gradients = small_input.new_empty(len(bounds) - 1, *dims)
    for gradient, (start, end) in zip(gradients, pairwise(bounds), strict=True):
        torch.mm(small_grad[start:end].T, small_input[start:end], out=gradient)
    return gradients.mul_(scale)


def project_rows(rows: Tensor, factor: Tensor, dim: int) -> Tensor:
    """Multiply every row by a factor's matrix.

    Parameters
    ----------
    rows : float32 | bfloat16 | float16 | float64 Tensor [T, D]
    factor : Tensor
        As in `ProjectedArguments`.
    dim : int
        Rows k of the matrix.

    Returns
    -------
    Tensor [T, k]
        Float32, but bfloat16 where bfloat16 rows meet a dense matrix of bfloat16 or int8: torch's product on a CPU sums
        in float32 and rounds once.
    """
    if factor.dtype == torch.int32 and can_sketch(rows, dim):
        return sketch_rows(rows, factor, dim)
    # Integers up to 127 are exact in every dtype; torch's product of float16 is slower than that of float32.
    dtype = torch.promote_types(rows.dtype, factor.dtype) if factor.dtype.is_floating_point else rows.dtype
    dtype = torch.float32 if dtype == torch.float16 else dtype
    product = rows.to(dtype) @ factor_matrix(factor, dim, dtype).T
    return product.float() if dtype == torch.float64 else product
