"""Influence between projected gradients: cheaper than the weight gradient, and right in expectation."""

from __future__ import annotations

import torch
from torch import Tensor

from tikmix_fast.ops.common.projected_checks import ProjectedArguments
from tikmix_fast.ops.common.projection import LayerProjection
from tikmix_fast.ops.dispatch import run_projected_domain_gradients
from tikmix_fast.ops.projected.schema import projected_group_influence_op

__all__ = ["projected_domain_gradients", "projected_group_influence"]


def _factors(projection: LayerProjection | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, float]:
    if isinstance(projection, LayerProjection):
        return projection.output_factor, projection.input_factor, projection.scale
    if not (isinstance(projection, tuple) and len(projection) == 2 and all(isinstance(p, Tensor) for p in projection)):
        raise TypeError(f"projection must be a LayerProjection or a pair of tensors; got {type(projection).__name__}")
    output, input = projection
    for name, matrix in (("k_out", output), ("k_in", input)):
        if not matrix.dtype.is_floating_point:
            raise TypeError(f"projection to {name} must be a floating-point tensor; got {matrix.dtype}")
    return output, input, 1.0


def projected_group_influence(
    input: Tensor,
    grad_output: Tensor,
    offsets: Tensor,
    queries: Tensor,
    projection: LayerProjection | tuple[Tensor, Tensor],
    *,
    order: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Estimate `group_influence` from gradients projected on both sides.

    The op reads every row of ``input`` and ``grad_output`` once and shrinks it to ``k_in`` or ``k_out`` numbers. The
    influence between those and the queries is an unbiased estimate of the exact one.

    Parameters
    ----------
    input, grad_output, offsets, order, backend
        As in `group_influence`.
    queries : Tensor [n, k_out, k_in]
        The projected task gradients: ``projection.project(queries)``.
    projection : LayerProjection, or a pair of floating-point Tensors ([k_out, O], [k_in, I])
        A pair should have ``E[P^T P] = I``.

    Returns
    -------
    float64 Tensor [n, m]
        ``<queries[i], P_out W_j P_in^T>``, where ``W_j`` is domain j's weight gradient; 0 for an empty domain. The
        standard error falls as ``1 / sqrt(k)``; `projection_stderr` estimates it.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or offset is wrong.
    RuntimeError
        If a tensor requires grad while grad mode is on, or the requested backend cannot run this call.

    Notes
    -----
    On a CPU a countsketch costs one pass over ``input`` and ``grad_output`` and sums in float32. The dense kinds cost
    ``2 T (O k_out + I k_in)`` operations of torch's product, which rounds projected bfloat16 rows to bfloat16. Then
    come ``2 T k_out k_in`` operations, and ``T (k_out + k_in)`` numbers of memory. The reference computes in float64.

    Examples
    --------
    >>> import torch
    >>> from tikmix_fast import ops
    >>> input, grad_output, offsets = torch.ones(6, 16), torch.ones(6, 16), torch.tensor([0, 2, 6])
    >>> projection = ops.LayerProjection(height=16, width=16, k_out=32, k_in=32)  # exact: k > O, I
    >>> queries = projection.project(torch.ones(1, 16, 16))
    >>> ops.projected_group_influence(input, grad_output, offsets, queries, projection)
    tensor([[ 512., 1024.]], dtype=torch.float64)
    """
    output_factor, input_factor, scale = _factors(projection)
    values: Tensor = projected_group_influence_op(
        input, grad_output, offsets, queries, output_factor, input_factor, scale, order, backend
    )
    return values


@torch.no_grad()
def projected_domain_gradients(
    input: Tensor,
    grad_output: Tensor,
    offsets: Tensor,
    projection: LayerProjection | tuple[Tensor, Tensor],
    *,
    order: Tensor | None = None,
) -> Tensor:
    """Form every domain's projected weight gradient, which `projection_stderr` needs.

    Parameters
    ----------
    input, grad_output, offsets, projection, order
        As in `projected_group_influence`.

    Returns
    -------
    float32 Tensor [m, k_out, k_in]
        ``P_out W_j P_in^T``. Its inner products with the queries are `projected_group_influence`.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or offset is wrong.

    Examples
    --------
    >>> import torch
    >>> projection = LayerProjection(height=20, width=30, k_out=16, k_in=32)
    >>> projected_domain_gradients(torch.ones(5, 30), torch.ones(5, 20), torch.tensor([0, 1, 5]), projection).shape
    torch.Size([2, 16, 32])
    """
    output_factor, input_factor, scale = _factors(projection)
    dims = (
        (projection.k_out, projection.k_in)
        if isinstance(projection, LayerProjection)
        else tuple(matrix.shape[0] for matrix in projection)
    )
    queries = input.new_empty(0, *dims)
    return run_projected_domain_gradients(
        ProjectedArguments(input, grad_output, offsets, queries, output_factor, input_factor, scale, order)
    )
