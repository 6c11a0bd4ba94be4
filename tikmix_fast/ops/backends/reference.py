"""The ops in plain torch and float64: the truth that every other backend is tested against."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from tikmix_fast.ops.common.checks import Arguments, check_order, domain_bounds
from tikmix_fast.ops.common.projected_checks import ProjectedArguments

__all__ = ["group_influence", "refusal", "unavailable"]


def unavailable() -> str | None:
    """Return None: torch is always there."""
    return None


def refusal(arguments: Arguments | ProjectedArguments) -> str | None:
    """Return None: every floating dtype, device and layout is taken."""
    return None


def group_influence(arguments: Arguments) -> Tensor:
    """Compute ``tikmix_fast.ops.group_influence`` one domain at a time, everything in float64."""
    input, grad_output, offsets, queries, _, order, grad_weight = arguments
    bounds = domain_bounds(offsets, input.shape[0])
    check_order(order, input.shape[0])
    values = torch.zeros(queries.shape[0], len(bounds) - 1, dtype=torch.float64, device=input.device)
    total = torch.zeros(queries.shape[1:], dtype=torch.float64, device=input.device)  # [O, I]
    flat_queries = queries.double().flatten(1)  # [n, O * I]
    for j, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        rows = slice(start, end) if order is None else order[start:end]
        gradient = grad_output[rows].double().T @ input[rows].double()  # [O, I]
        values[:, j] = flat_queries @ gradient.flatten()
        total += gradient
    if grad_weight is not None:
        grad_weight.copy_(grad_weight.double() + total)  # rounded once
    return values
