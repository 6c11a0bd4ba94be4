"""Which weights are measured through random projections, and through which."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tikmix_fast import ops
from tikmix_fast.ops.common.projection import ProjectionKind

__all__ = ["Projection", "back_project", "expected_error", "projected_weights"]

_LARGEST_COUNTSKETCH = 1024


@dataclass(frozen=True)
class Projection:
    """Measure the matrices of layers through random projections of both their sides: cheaper, and noisier.

    A weight gradient [O, I] is seen as [dim, dim], so its influence costs less than the weight gradient itself, and its
    queries take dim x dim numbers each instead of O x I. The influence is right in expectation; the error it gains is
    estimated and becomes the part ``stderr_projection`` of the matrix. Projected are the weights of ``nn.Linear``,
    ``nn.Embedding`` and transformers' ``Conv1D``, in all their uses; those with a side of at most ``dim``, vectors and
    other parameters are measured exactly. The weight of a product and a table cost one pass over their rows; where a
    weight is transposed, scaled or sliced first, a gradient per domain is formed, one at a time.

    Attributes
    ----------
    dim : int
        At least 32 for the error estimate to be stable; a power of two from 16 to 1024 for a countsketch. Default: 64,
        or the smallest that `expected_error` says is enough for ``target_error``.
    kind : {"countsketch", "rademacher", "gaussian"}
        See `tikmix_fast.ops.LayerProjection`.
    seed : int
        Every layer has matrices of its own, drawn from the seed and the parameter's name, so that their errors are
        independent.
    target_error : float, optional
        Chooses ``dim``, instead of it: what the error of S is to be as a share of ``|q_i| |g_j|``, in root mean square.
        What it came to in your run is ``stderr_projection``.
    tables : bool
        Whether tables of ``nn.Embedding``, and heads tied to them, are projected too. False: measured exactly, at the
        memory of whole queries. The noise of projecting goes with the size of a query's rows, those of tokens included
        that no domain has: with Adam the row of a token never trained on is some 100,000 times too large, which
        ``Adam(floor=1.0)`` prevents.
    redraw : bool
        Whether every refresh draws new matrices. True: the errors of rounds are independent and average out. False:
        they are alike, and what changes between two rounds is seen with less noise than either; as how alike they are
        is not measured, the standard errors of rounds are added, which is too much for rounds that differ.

    Raises
    ------
    ValueError
        If a value is out of range, no ``dim`` of this kind reaches the target, or both are given and disagree.

    Examples
    --------
    >>> Projection(dim=32)
    Projection(dim=32, kind='countsketch', seed=0, target_error=None, redraw=True, tables=True)
    >>> Projection(target_error=0.1).dim
    128
    """

    dim: int = None  # type: ignore[assignment]  # not once it is made: chosen below
    kind: ProjectionKind = "countsketch"
    seed: int = 0
    target_error: float | None = None
    redraw: bool = True
    tables: bool = True

    def __post_init__(self) -> None:
        for name in ("redraw", "tables"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False; got {getattr(self, name)!r}")
        chosen = 64 if self.target_error is None else _smallest_dim(self.target_error, self.kind)
        if self.dim is None:
            object.__setattr__(self, "dim", chosen)
        elif self.target_error is not None and self.dim != chosen:
            raise ValueError(
                f"dim must not be given beside target_error, which chooses it ({chosen} here); got {self.dim}"
            )
        if not isinstance(self.dim, int) or isinstance(self.dim, bool) or self.dim < 2:
            raise ValueError(f"dim must be an int of at least 2; got {self.dim!r}")
        try:
            ops.LayerProjection(height=1, width=1, k_out=self.dim, k_in=self.dim, kind=self.kind, seed=self.seed)
        except ValueError as error:
            raise ValueError(str(error).replace("k_out", "dim")) from None

    def layers(
        self, model: nn.Module, parameters: Mapping[str, Tensor], refreshes: int = 0
    ) -> dict[str, ops.LayerProjection]:
        """Draw the matrices of every weight that is measured through them, by the name of the parameter."""
        projected = projected_weights(model, parameters, self.dim, self.tables)
        return {
            name: ops.LayerProjection(
                height=parameter.shape[0],
                width=parameter.shape[1],
                k_out=self.dim,
                k_in=self.dim,
                kind=self.kind,
                seed=self.seed,
                layer=f"{name}@{refreshes}" if refreshes and self.redraw else name,
                device=str(parameter.device),
            )
            for name, parameter in parameters.items()
            if name in projected
        }

    def total_variance(self, closed: NDArray[np.float64], of_round: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the variance that projecting adds to a sum over rounds, given those of its two parts.

        With matrices of their own their errors are independent. With the same ones the standard errors are added: the
        truth for rounds whose gradients are alike, an upper bound for any (of standard deviations).
        """
        total: NDArray[np.float64] = closed + of_round if self.redraw else (np.sqrt(closed) + np.sqrt(of_round)) ** 2
        return total


def expected_error(dim: int) -> float:
    """Return the error of S, as a share of ``|q_i| |g_j|``, that a projection to ``dim`` is expected to add.

    Over the draw of Gaussian matrices, one layer with query Q and gradient G adds the variance ``(c / dim + 1 /
    dim^2) |Q|^2 |G|^2``, about, with ``c = (|G^T Q|^2 + |G Q^T|^2 + 2 tr (G Q^T)^2) / (|Q|^2 |G|^2)``: 4 where both are
    the same matrix of rank one, 1 where they have four singular directions of equal strength in common. In a small
    trained language model a layer's mean over cells was 0.2 to 1.1. Errors of layers are independent.

    What is returned is sqrt(1 / dim + 1 / dim^2): c = 1, and one layer with all of the influence, as the head of a
    model has it without preconditioner. No gradients exceed it more than twofold; where L layers have equal shares of
    ``|q_i| |g_j|``, the error is sqrt(L) times smaller.

    Examples
    --------
    >>> round(expected_error(64), 3)
    0.126
    """
    return math.sqrt(1 / dim + 1 / dim**2)


def _smallest_dim(target: float, kind: ProjectionKind) -> int:
    if not (isinstance(target, (int, float)) and 0 < target < 1):
        raise ValueError(f"target_error must be a share of |q| |g|, above 0 and below 1; got {target!r}")
    # The root of 1 / dim + 1 / dim^2 = target^2, and no less than what has a stable error estimate.
    dim = max(32, math.ceil((1 + math.sqrt(1 + 4 * target**2)) / (2 * target**2)))
    if kind != "countsketch":
        return dim
    dim = 1 << (dim - 1).bit_length()
    if dim > _LARGEST_COUNTSKETCH:
        least = expected_error(_LARGEST_COUNTSKETCH)
        raise ValueError(
            f"target_error must be at least {least:.3f} for a countsketch (dim {_LARGEST_COUNTSKETCH}); "
            f"got {target}; allow more, use another kind, or measure with projection=None"
        )
    return dim


def projected_weights(model: nn.Module, parameters: Mapping[str, Tensor], dim: int, tables: bool = True) -> set[str]:
    """Return the names of the weights and tables that are measured through projections to ``dim``."""
    matrices: set[int] = set()
    others: set[int] = set()
    for module in model.modules():
        kinds = (nn.Linear, nn.Embedding) if tables else (nn.Linear,)
        known = isinstance(module, kinds) or type(module).__name__ == "Conv1D"
        for parameter in module._parameters.values():
            (matrices if known else others).add(id(parameter))
    return {
        name
        for name, parameter in parameters.items()
        if parameter.ndim == 2 and min(parameter.shape) > dim and id(parameter) in matrices - others
    }


def back_project(queries: Tensor, projection: ops.LayerProjection) -> Tensor:
    """Return the gradients [n, O, I] whose exact influence is what the projected queries [n, k_out, k_in] measure."""
    output, input = projection.matrices(queries.dtype)
    return output.T @ queries @ input
