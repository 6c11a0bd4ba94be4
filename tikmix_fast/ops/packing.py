"""Queries prepared once per refresh, so that a kernel need not lay them out again in every call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PackedQueries", "pack_queries"]


@dataclass(frozen=True)
class PackedQueries:
    """The task gradients of one layer in the layout the kernels read fastest; made by `pack_queries`.

    Attributes
    ----------
    tensor : float32 | bfloat16 [n, O, I]
        The queries, contiguous.
    """

    tensor: Tensor

    def __post_init__(self) -> None:
        if self.tensor.dim() != 3:
            raise ValueError(f"queries must have shape (n, O, I); got {tuple(self.tensor.shape)}")

    @property
    def shape(self) -> torch.Size:
        """The shape [n, O, I] of the queries."""
        return self.tensor.shape


def pack_queries(queries: Tensor) -> PackedQueries:
    """Lay out task gradients for repeated calls of `group_influence`.

    Parameters
    ----------
    queries : float32 | bfloat16 | float16 | float64 Tensor [n, O, I]
        The preconditioned task gradients of one layer. The handle keeps its own copy unless they are contiguous
        already.

    Returns
    -------
    PackedQueries
        A handle of tensors and ints only, so that ``torch.compile`` takes it as an argument.

    Raises
    ------
    ValueError, TypeError
        If ``queries`` has not three dimensions, or is not floating point.

    Examples
    --------
    >>> import torch
    >>> pack_queries(torch.zeros(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """
    if not queries.dtype.is_floating_point:
        raise TypeError(f"queries must be a floating-point tensor; got {queries.dtype}")
    return PackedQueries(queries.detach().contiguous())
