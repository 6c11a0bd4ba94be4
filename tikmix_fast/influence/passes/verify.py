"""Recompute cells of the influence matrix by another road: forward-mode derivatives in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["Cell", "Verification", "recompute_cells"]


@dataclass(frozen=True)
class Cell:
    """One (task, domain) cell: as captured, as recomputed, and |difference| / (|q_i| |g_j|)."""

    task: str
    domain: str
    captured: float
    recomputed: float
    error: float


@dataclass(frozen=True)
class Verification:
    """The cells that were recomputed; ``max_error`` is the largest error, as a share of |q_i| |g_j|."""

    cells: tuple[Cell, ...]

    @property
    def max_error(self) -> float:
        """The largest error of any cell."""
        return max(cell.error for cell in self.cells)

    def __str__(self) -> str:
        lines = [
            f"{cell.task} / {cell.domain}: captured {cell.captured:.9g}, recomputed {cell.recomputed:.9g}, error "
            f"{cell.error:.1e}"
            for cell in self.cells
        ]
        return "\n".join([f"{len(self.cells)} cells, largest error {self.max_error:.1e} of |q| |g|", *lines])


class _Losses(nn.Module):
    """The user's function of model and batch as a module, so that its parameters can be replaced."""

    def __init__(self, model: nn.Module, loss_per_row: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss_per_row = loss_per_row

    def forward(self, batch: Any) -> Tensor:
        return self._loss_per_row(self.model, batch)


def recompute_cells(
    model: nn.Module,
    loss_per_row: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    row_domains: Tensor,
    parameters: Mapping[str, Tensor],
    queries: Mapping[str, Tensor],
    chosen: Sequence[tuple[int, int]],
) -> list[tuple[float, float]]:
    """Return for each chosen (query, domain) the derivative of the domain's summed loss along the query, and |q| |g|.

    Everything runs in float64 on copies of the parameters: the model itself is not touched, and none of the capture
    takes part.

    Parameters
    ----------
    model : nn.Module
    loss_per_row : callable (model, batch) -> Tensor [B] or [B, S]
        The loss of every row or position, not reduced over them.
    batch : any nesting of tensors
    row_domains : int64, of the shape of the losses
        The domain of each loss.
    parameters, queries : mappings by parameter name; one query [*shape] each
        ``queries`` [q, *shape].
    chosen : pairs (index of the query, index of the domain)
    """
    wide = torch.utils._pytree.tree_map(_double, batch)
    losses = _Losses(model, loss_per_row)
    names = {id(parameter): name for name, parameter in losses.named_parameters()}
    frozen = {name: _double(value.detach()) for name, value in (*losses.named_parameters(), *losses.named_buffers())}
    moving = {name: names[id(parameter)] for name, parameter in parameters.items()}
    point = {moving[name]: frozen.pop(moving[name]) for name in parameters}

    def of(at: Mapping[str, Tensor]) -> Tensor:
        values: Tensor = torch.func.functional_call(losses, {**frozen, **at}, (wide,), tie_weights=True)
        return values

    results: dict[tuple[int, int], tuple[float, float]] = {}
    # The fused attention kernels have no forward-mode derivative, and torch loads that of others by its own deprecated
    # means.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
        for index in {query for query, _ in chosen}:
            direction = {moving[name]: queries[name][index].double() for name in parameters}
            slopes = torch.func.jvp(of, (point,), (direction,))[1]
            if slopes.shape != row_domains.shape:
                raise ValueError(
                    f"loss_per_row must return losses of shape {list(row_domains.shape)}, as the ids; got "
                    f"{list(slopes.shape)}"
                )
            length = torch.stack([each.square().sum() for each in direction.values()]).sum().sqrt()
            for query, domain in chosen:
                if query != index:
                    continue
                mine = row_domains.to(slopes.device) == domain
                leaves = {name: value.detach().requires_grad_() for name, value in point.items()}
                gradients = torch.autograd.grad(of(leaves)[mine].sum(), list(leaves.values()), allow_unused=True)
                norm = torch.stack([each.square().sum() for each in gradients if each is not None]).sum().sqrt()
                results[query, domain] = float(slopes[mine].sum()), float(length * norm)
    return [results[pair] for pair in chosen]


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
