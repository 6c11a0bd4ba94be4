"""Which weights are measured through random projections, and through which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from tikmix_fast import ops
from tikmix_fast.ops.projection import ProjectionKind

__all__ = ["Projection", "back_project", "projected_weights"]


@dataclass(frozen=True)
class Projection:
    """Measure the weights of linear layers through random projections of both their sides: cheaper, and noisier.

    A weight gradient [O, I] is seen as [dim, dim], so its influence costs less than the weight gradient itself, and its
    queries take dim x dim numbers each instead of O x I. The influence is right in expectation; the error it gains is
    estimated and becomes the part ``stderr_projection`` of the matrix. Weights with a side of at most ``dim``, tables,
    vectors and whatever is no weight of an ``nn.Linear`` (or of transformers' ``Conv1D``) are measured exactly.

    Attributes
    ----------
    dim : int
        At least 32 for the error estimate to be stable; a power of two from 16 to 1024 for a countsketch.
    kind : {"countsketch", "rademacher", "gaussian"}
        See `tikmix_fast.ops.LayerProjection`.
    seed : int
        Every layer has matrices of its own, drawn from the seed and the parameter's name, and new ones after every
        refresh, so that the errors of both are independent.

    Raises
    ------
    ValueError
        If a value is out of range.

    Examples
    --------
    >>> Projection(dim=32)
    Projection(dim=32, kind='countsketch', seed=0)
    """

    dim: int = 64
    kind: ProjectionKind = "countsketch"
    seed: int = 0

    def __post_init__(self) -> None:
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
        projected = projected_weights(model, parameters, self.dim)
        return {
            name: ops.LayerProjection(
                height=parameter.shape[0],
                width=parameter.shape[1],
                k_out=self.dim,
                k_in=self.dim,
                kind=self.kind,
                seed=self.seed,
                layer=f"{name}@{refreshes}" if refreshes else name,
                device=str(parameter.device),
            )
            for name, parameter in parameters.items()
            if name in projected
        }


def projected_weights(model: nn.Module, parameters: Mapping[str, Tensor], dim: int) -> set[str]:
    """Return the names of the weights and tables that are measured through projections to ``dim``."""
    matrices: set[int] = set()
    others: set[int] = set()
    for module in model.modules():
        known = isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D"
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
