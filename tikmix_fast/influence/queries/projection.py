"""Random projections of layers: which weights they cover, and with which matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tikmix_fast import ops
from tikmix_fast.arguments import require_int
from tikmix_fast.ops.common.projection import ProjectionKind

__all__ = ["Projection", "back_project", "expected_error", "projected_weights"]

_LARGEST_COUNTSKETCH = 1024


@dataclass(frozen=True)
class Projection:
    """Measure the matrices of layers through random projections of both sides: cheaper, and noisier.

    A weight gradient [O, I] shrinks to [dim, dim], so its influence costs less than the weight gradient itself, and
    each query takes dim x dim numbers instead of O x I. The influence is unbiased. The error of projecting is estimated
    and becomes ``stderr_projection`` of the matrix. The projection covers the weights of ``nn.Linear``,
    ``nn.Embedding`` and transformers' ``Conv1D``, in all their uses. Weights with a side of at most ``dim``, vectors
    and other parameters are measured exactly. Products and table look-ups cost one pass over their rows. If the model
    transposes, scales or slices a weight first, one gradient per domain is formed, one at a time.

    Attributes
    ----------
    dim : int
        At least 32 gives a stable error estimate; a countsketch needs a power of two from 16 to 1024. Default: 64, or
        with ``target_error`` the smallest that reaches it by `expected_error`.
    kind : {"countsketch", "rademacher", "gaussian"}
        See `tikmix_fast.ops.LayerProjection`.
    seed : int
        Seed and parameter name draw each layer's own matrices, so that the errors of layers are independent.
    target_error : float, optional
        Chooses ``dim``: the root mean square error of S that you accept, as a share of ``|q_i| |g_j|``. The error of
        your run is ``stderr_projection``.
    redraw : bool
        Whether every refresh draws new matrices. True: the errors of rounds are independent and average out. False: the
        errors of rounds are alike, so differences between rounds have less noise than either round. The standard errors
        of rounds then add up, which is too much for rounds that differ.
    tables : bool
        Whether tables of ``nn.Embedding``, and heads tied to them, are projected too. False: they are measured exactly,
        at the memory of whole queries. A query's noise grows with the size of all its rows, even of tokens that no
        domain has. With Adam, the row of a token that was never trained is some 100,000 times too large;
        ``Adam(floor=1.0)`` prevents that.

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

    dim: int = None  # type: ignore[assignment]  # chosen in __post_init__
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
        require_int("dim", self.dim, 2)
        try:
            ops.LayerProjection(height=1, width=1, k_out=self.dim, k_in=self.dim, kind=self.kind, seed=self.seed)
        except ValueError as error:
            raise ValueError(str(error).replace("k_out", "dim")) from None

    def layers(
        self, model: nn.Module, parameters: Mapping[str, Tensor], refreshes: int = 0
    ) -> dict[str, ops.LayerProjection]:
        """Return the projection of every weight that is projected, by the name of the parameter."""
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
        """Return the variance of a sum over rounds, given the variances of its two parts.

        Rounds with their own matrices have independent errors. Rounds with the same matrices add their standard errors:
        exact if the gradients are alike, else an upper bound.
        """
        total: NDArray[np.float64] = closed + of_round if self.redraw else (np.sqrt(closed) + np.sqrt(of_round)) ** 2
        return total


def expected_error(dim: int) -> float:
    """Return the error of S that a projection to ``dim`` is expected to add, as a share of ``|q_i| |g_j|``.

    Over the draw of Gaussian matrices, one layer with query Q and gradient G adds a variance of about ``(c / dim + 1 /
    dim^2) |Q|^2 |G|^2``, with ``c = (|G^T Q|^2 + |G Q^T|^2 + 2 tr (G Q^T)^2) / (|Q|^2 |G|^2)``. c is 4 if both are the
    same matrix of rank one, and 1 if they share four singular directions of equal strength. In a small trained language
    model, the mean of c over cells was 0.2 to 1.1, depending on the layer. Errors of layers are independent.

    The result is sqrt(1 / dim + 1 / dim^2). It assumes c = 1 and one layer that carries all of the influence, as a
    model's head does without a preconditioner. The error is at most twice that for any gradients. It is sqrt(L) times
    smaller if L layers have equal shares of ``|q_i| |g_j|``.

    Examples
    --------
    >>> round(expected_error(64), 3)
    0.126
    """
    return math.sqrt(1 / dim + 1 / dim**2)


def _smallest_dim(target: float, kind: ProjectionKind) -> int:
    if not (isinstance(target, (int, float)) and 0 < target < 1):
        raise ValueError(f"target_error must be a share of |q| |g|, above 0 and below 1; got {target!r}")
    # Solve 1 / dim + 1 / dim^2 = target^2; a smaller dim than 32 has no stable error estimate.
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
    """Return P_out^T q P_in [n, O, I]: the queries whose exact influence the projected ones measure."""
    output, input = projection.matrices(queries.dtype)
    return output.T @ queries @ input
