"""Checks of the arguments of the projected op, without reading a value."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tikmix_fast.ops.common.checks import check_rows, require_floating, require_rows, require_shape

__all__ = ["ProjectedArguments", "check_projected_arguments"]


class ProjectedArguments(NamedTuple):
    """The arguments of one ``projected_group_influence`` call, in the order of its schema.

    A factor is one of the two matrices: int32 codes [D] of a CountSketch, or the matrix [k, D] itself, int8 or floating
    point.
    """

    input: Tensor
    grad_output: Tensor
    offsets: Tensor
    queries: Tensor
    output_factor: Tensor
    input_factor: Tensor
    scale: float
    order: Tensor | None


def _check_factor(name: str, factor: Tensor, dim: int, columns: int) -> None:
    if factor.dtype == torch.int32:
        require_shape(name, factor, (columns,))
        return
    require_shape(name, factor, (dim, columns))
    if factor.dtype != torch.int8:
        require_floating(name, factor)


def check_projected_arguments(arguments: ProjectedArguments) -> None:
    """Check shapes, dtypes and devices.

    Raises
    ------
    ValueError
        If shapes disagree, an index tensor is not int64, or the tensors are on different devices.
    TypeError
        If input, grad_output, queries or a matrix is not floating point.
    """
    input, grad_output, offsets, queries, output_factor, input_factor, _, order = arguments
    height, width = require_rows(input, grad_output)
    require_shape("queries", queries, ("n", "k_out", "k_in"))
    _check_factor("projection to k_out", output_factor, queries.shape[1], height)
    _check_factor("projection to k_in", input_factor, queries.shape[2], width)
    numbers = {"input": input, "grad_output": grad_output, "queries": queries}
    check_rows(numbers, offsets, order, {"projection to k_out": output_factor, "projection to k_in": input_factor})
