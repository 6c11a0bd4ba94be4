"""The projected calls with both matrices written out in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tikmix_fast.ops.backends.reference.exact import domain_gradients, group_influence
from tikmix_fast.ops.common.checks import Arguments
from tikmix_fast.ops.common.projected_checks import ProjectedArguments
from tikmix_fast.ops.common.projection import factor_matrix

__all__ = ["projected_domain_gradients", "projected_group_influence"]


def projected_group_influence(arguments: ProjectedArguments) -> Tensor:
    """Compute ``tikmix_fast.ops.projected_group_influence``."""
    input, grad_output = _project(arguments)
    return arguments.scale * group_influence(
        Arguments(input, grad_output, arguments.offsets, arguments.queries, None, arguments.order, None)
    )


def projected_domain_gradients(arguments: ProjectedArguments) -> Tensor:
    """Compute ``tikmix_fast.ops.projected_domain_gradients``; only the shape of the queries is read."""
    input, grad_output = _project(arguments)
    gradients = input.new_empty(len(arguments.offsets) - 1, *arguments.queries.shape[1:], dtype=torch.float32)
    domains = domain_gradients(input, grad_output, arguments.offsets, arguments.order)
    for target, gradient in zip(gradients, domains, strict=True):
        target.copy_(arguments.scale * gradient)
    return gradients


def _project(arguments: ProjectedArguments) -> tuple[Tensor, Tensor]:
    """Return the projected rows of input [T, k_in] and grad_output [T, k_out]."""
    k_out, k_in = arguments.queries.shape[1:]
    input_matrix = factor_matrix(arguments.input_factor, k_in, torch.float64)
    output_matrix = factor_matrix(arguments.output_factor, k_out, torch.float64)
    return arguments.input.double() @ input_matrix.T, arguments.grad_output.double() @ output_matrix.T
