"""Queries laid out once per refresh instead of in every call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tikmix_fast.ops.exact.schema import pack_queries_op

__all__ = ["PackedQueries", "pack_queries"]


@dataclass(frozen=True, eq=False)
class PackedQueries:
    """The task gradients of one layer, with a copy in the order in which the kernel reads them; see `pack_queries`.

    Attributes
    ----------
    tensor : float32 | bfloat16 [n, O, I]
        The queries.
    panels : Tensor or None
        The copy; its shape identifies the layout. None if the kernel reads ``tensor`` itself.
    """

    tensor: Tensor
    panels: Tensor | None = None

    def __post_init__(self) -> None:
        require_queries(self.tensor)
        if self.panels is not None and self.panels.device != self.tensor.device:
            raise ValueError(f"panels must be on the device of tensor, {self.tensor.device}; got {self.panels.device}")

    @property
    def shape(self) -> torch.Size:
        """The shape [n, O, I] of the queries."""
        return self.tensor.shape


def pack_queries(queries: Tensor) -> PackedQueries:
    """Lay out task gradients for repeated calls of `group_influence`.

    Parameters
    ----------
    queries : float32 | bfloat16 | float16 | float64 Tensor [n, O, I]
        The preconditioned task gradients of one layer. They must not change afterwards: the handle holds them and a
        copy for the kernel in use. A call that runs on another kernel reads the tensor itself.

    Returns
    -------
    PackedQueries
        A handle of tensors only, so that ``torch.compile`` takes it as an argument.

    Raises
    ------
    ValueError, TypeError
        If ``queries`` does not have three dimensions or is not floating point.

    Examples
    --------
    >>> import torch
    >>> pack_queries(torch.zeros(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """
    if not isinstance(queries, Tensor) or not queries.dtype.is_floating_point:
        raise TypeError(f"queries must be a floating-point tensor; got {getattr(queries, 'dtype', type(queries))}")
    require_queries(queries)
    queries = queries.detach().contiguous()
    panels = pack_queries_op(queries)
    return PackedQueries(queries, panels if panels.dim() > 1 else None)


def require_queries(queries: Tensor) -> None:
    """Raise ValueError unless the queries have three dimensions."""
    if queries.dim() != 3:
        raise ValueError(f"queries must have shape (n, O, I); got {tuple(queries.shape)}")
