"""Projected gradients of an embedding table, without a one-hot row per lookup."""

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
    """Form every domain's projected gradient of a table [V, C] from which rows were looked up.

    The gradient is a sum over lookups of a unit vector times the gradient of the row. Its projection is therefore a sum
    over lookups of a column of ``P_out`` times the projected gradient of the row. The columns are gathered.

    Parameters
    ----------
    ids : int64 Tensor [T]
        The row of each lookup, in ``0 ... V - 1``.
    grad_rows : float32 | bfloat16 | float16 | float64 Tensor [T, C]
        The gradient with respect to the row that each lookup returned.
    offsets, order
        As in `projected_group_influence`, for the T lookups.
    projection : LayerProjection
        One of height V and width C.

    Returns
    -------
    float32 Tensor [m, k_out, k_in]
        ``P_out W_j P_in^T``, where ``W_j`` is domain j's gradient of the table. `projected_domain_gradients` gives the
        same from one-hot rows [T, V].

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or offset is wrong.

    Notes
    -----
    Costs `projected_domain_gradients` of a layer with C inputs and k_out outputs, and T k_out numbers of memory. The
    cost does not depend on V.

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
    # The CountSketch that sends every column to its own row: this side is already projected.
    identity = torch.arange(projection.k_out, dtype=torch.int32, device=ids.device)
    queries = grad_rows.new_empty(0, projection.k_out, projection.k_in)
    return run_projected_domain_gradients(
        ProjectedArguments(
            grad_rows, gathered, offsets, queries, identity, projection.input_factor, projection.scale, order
        )
    )
