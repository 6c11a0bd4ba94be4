"""Group influence row by row, where domains have so few rows that forming their gradients does not pay."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["row_wise_influence"]

# Rows at a time: what a query makes of them is read again while it is in cache.
_ROWS = 1024


def row_wise_influence(
    input: Tensor, grad_output: Tensor, bounds: list[int], queries: Tensor, order: Tensor | None
) -> Tensor:
    """Sum ``<grad_output[t], queries[i] input[t]>`` over the rows of every domain.

    Parameters
    ----------
    input, grad_output, queries, order
        As in `tikmix_fast.ops.group_influence`. Multiplied in float32: a product of a row and a query in 16 bits would
        lose digits, or overflow.
    bounds : list of int [m + 1]
        The offsets.

    Returns
    -------
    float64 Tensor [n, m]
    """
    tasks = len(queries)
    per_row = input.new_empty(tasks, len(input), dtype=torch.float64)
    for i, query in enumerate(queries):
        transposed = query.float().T
        for start in range(0, len(input), _ROWS):
            rows = slice(start, start + _ROWS)
            per_row[i, rows] = torch.linalg.vecdot(
                (input[rows].float() @ transposed).double(), grad_output[rows].double()
            )
    if order is not None:
        per_row = per_row[:, order]
    sizes = torch.tensor(bounds, device=input.device).diff()
    domains = torch.repeat_interleave(sizes)
    return per_row.new_zeros(tasks, len(sizes)).index_add_(1, domains, per_row)
