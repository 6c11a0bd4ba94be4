"""The projected calls on a CPU: rows are projected first, and the exact call takes the projected rows."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from tikmix_fast.ops.backends.cpu import native
from tikmix_fast.ops.backends.cpu.exact import group_influence
from tikmix_fast.ops.common.checks import Arguments, check_order, domain_bounds
from tikmix_fast.ops.common.projected_checks import ProjectedArguments
from tikmix_fast.ops.common.projection import factor_matrix, is_sketch_dim

__all__ = ["projected_domain_gradients", "projected_group_influence", "sketch_rows"]


def projected_group_influence(arguments: ProjectedArguments) -> Tensor:
    """Compute ``tikmix_fast.ops.projected_group_influence``."""
    input, grad_output = _project(arguments)
    return arguments.scale * group_influence(
        Arguments(input, grad_output, arguments.offsets, arguments.queries, None, arguments.order, None)
    )


def projected_domain_gradients(arguments: ProjectedArguments) -> Tensor:
    """Compute ``tikmix_fast.ops.projected_domain_gradients``; only the shape of the queries is read."""
    rows = len(arguments.input)
    bounds = domain_bounds(arguments.offsets, rows)
    check_order(arguments.order, rows)
    input, grad_output = (matrix.float() for matrix in _project(arguments))
    if arguments.order is not None:
        input, grad_output = input[arguments.order], grad_output[arguments.order]
    gradients = input.new_empty(len(bounds) - 1, *arguments.queries.shape[1:])
    for gradient, (start, end) in zip(gradients, pairwise(bounds), strict=True):
        torch.mm(grad_output[start:end].T, input[start:end], out=gradient)
    return gradients.mul_(arguments.scale)


def _project(arguments: ProjectedArguments) -> tuple[Tensor, Tensor]:
    """Return the projected rows of input [T, k_in] and grad_output [T, k_out]."""
    k_out, k_in = arguments.queries.shape[1:]
    return (
        _project_rows(arguments.input, arguments.input_factor, k_in),
        _project_rows(arguments.grad_output, arguments.output_factor, k_out),
    )


def _project_rows(rows: Tensor, factor: Tensor, dim: int) -> Tensor:
    """Multiply every row by a factor's matrix.

    Parameters
    ----------
    rows : float32 | bfloat16 | float16 Tensor [T, D]
    factor : Tensor
        As in `ProjectedArguments`.
    dim : int
        Rows k of the matrix.

    Returns
    -------
    Tensor [T, k]
        float32. bfloat16 where bfloat16 rows meet a dense matrix of bfloat16 or int8: torch's product on a CPU sums
        in float32 and rounds once.
    """
    # Codes to another number of rows do not come from a sketch: a lookup passes the identity in this form.
    if factor.dtype == torch.int32 and is_sketch_dim(dim):
        return sketch_rows(rows, factor, dim)
    # Integers up to 127 are exact in every dtype. torch multiplies float16 more slowly than float32.
    dtype = torch.promote_types(rows.dtype, factor.dtype) if factor.dtype.is_floating_point else rows.dtype
    dtype = torch.float32 if dtype == torch.float16 else dtype
    product = rows.to(dtype) @ factor_matrix(factor, dim, dtype).T
    return product.float() if dtype == torch.float64 else product


def sketch_rows(rows: Tensor, codes: Tensor, dim: int) -> Tensor:
    """Take the CountSketch of every row.

    Parameters
    ----------
    rows : float32 | bfloat16 | float16 Tensor [T, columns]
    codes : int32 Tensor [columns]
        A factor of a `tikmix_fast.ops.LayerProjection`.
    dim : int
        A power of two from 16 to 1024.

    Returns
    -------
    float32 Tensor [T, dim]

    Raises
    ------
    ValueError
        If the codes are not a block-permuted sketch to ``dim`` rows.
    """
    codes = codes.contiguous()
    output = rows.new_empty(rows.shape[0], dim, dtype=torch.float32)
    native.module.sketch_rows(
        instruction_set=native.chosen_instruction_set(),
        threads=torch.get_num_threads(),
        sizes=(*rows.shape, dim),
        input=native.matrix_argument(rows),
        codes=codes.data_ptr(),
        output=output.data_ptr(),
    )
    return output
