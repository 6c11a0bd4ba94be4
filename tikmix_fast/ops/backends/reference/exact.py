"""``tikmix_fast.ops.group_influence``, one domain at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from tikmix_fast.ops.common.checks import Arguments, check_order, domain_bounds

__all__ = ["domain_gradients", "group_influence"]


def domain_gradients(input: Tensor, grad_output: Tensor, offsets: Tensor, order: Tensor | None) -> Iterator[Tensor]:
    """Yield the float64 weight gradient [O, I] of one domain after the other."""
    bounds = domain_bounds(offsets, input.shape[0])
    check_order(order, input.shape[0])
    for start, end in pairwise(bounds):
        rows = slice(start, end) if order is None else order[start:end]
        yield grad_output[rows].double().T @ input[rows].double()


def group_influence(arguments: Arguments) -> Tensor:
    """Compute ``tikmix_fast.ops.group_influence`` in float64."""
    input, grad_output, offsets, queries, _, order, grad_weight = arguments
    values = torch.zeros(queries.shape[0], len(offsets) - 1, dtype=torch.float64, device=input.device)
    total = torch.zeros(queries.shape[1:], dtype=torch.float64, device=input.device)  # [O, I]
    flat_queries = queries.double().flatten(1)  # [n, O * I]
    lengths = offsets.diff().tolist()
    for j, gradient in enumerate(domain_gradients(input, grad_output, offsets, order)):
        if lengths[j]:  # otherwise a query that is not finite would give NaN instead of 0
            values[:, j] = flat_queries @ gradient.flatten()
            total += gradient
    if grad_weight is not None:
        grad_weight.copy_(grad_weight.double() + total)  # rounded once
    return values
