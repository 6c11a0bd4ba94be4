"""Projected gradients of a table that rows were looked up in, without a row of zeros per entry of the table."""

from __future__ import annotations

import torch
from torch import Tensor

from tikmix_fast.ops.common.checks import require_shape
from tikmix_fast.ops.common.projected_checks import ProjectedArguments
from tikmix_fast.ops.common.projection import LayerProjection, factor_matrix
from tikmix_fast.ops.dispatch import run_projected_domain_gradients

__all__ = ["projected_lookup_gradients"]


@torch.no_grad()
def projected_lookup_gradients(
    ids: Tensor, grad_rows: Tensor, offsets: Tensor, projection: LayerProjection, *, order: Tensor | None = None
) -> Tensor:
    """Form every domain's projected gradient of a table [V, C], rows of which were looked up.

    That gradient is the sum over lookups of a unit vector times the gradient of the row, so that the one side of its
    projection is a column of ``P_out`` per lookup, gathered, and the other the projected gradient of the row.

    Parameters
    ----------
    ids : int64 Tensor [T]
        The rows that were looked up, in ``0 ... V - 1``.
    grad_rows : float32 | bfloat16 | float16 | float64 Tensor [T, C]
        The gradients of what was found.
    offsets, order
        As in `projected_group_influence`, for the T lookups.
    projection : LayerProjection
        Of height V and width C.

    Returns
    -------
    float32 Tensor [m, k_out, k_in]
        ``P_out W_j P_in^T`` with domain j's gradient ``W_j`` of the table: what `projected_domain_gradients` makes of
        one-hot rows [T, V].

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or offset is wrong.

    Notes
    -----
    Cost: `projected_domain_gradients` of a layer with C inputs and k_out outputs, and T k_out numbers of memory. No
    number depends on V.

    Examples
    --------
    >>> projection = LayerProjection(height=1000, width=80)
    >>> ids, grad_rows = torch.tensor([7, 7, 999]), torch.ones(3, 80)
    >>> projected_lookup_gradients(ids, grad_rows, torch.tensor([0, 2, 3]), projection).shape
    torch.Size([2, 64, 64])
    """
    require_shape("grad_rows", grad_rows, ("T", projection.width))
    require_shape("ids", ids, (grad_rows.shape[0],))
    gathered = factor_matrix(projection.output_factor[..., ids], projection.k_out, grad_rows.dtype).T
    # The CountSketch that sends every column to its own row: nothing is left to shrink on this side.
    identity = torch.arange(projection.k_out, dtype=torch.int32, device=ids.device)
    queries = grad_rows.new_empty(0, projection.k_out, projection.k_in)
    return run_projected_domain_gradients(
        ProjectedArguments(
            grad_rows, gathered, offsets, queries, identity, projection.input_factor, projection.scale, order
        )
    )
