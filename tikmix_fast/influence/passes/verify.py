"""Recompute cells of the influence matrix by another road: forward-mode derivatives in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tikmix_fast.influence.capture.captured_pass import captured_pass
from tikmix_fast.influence.capture.rows import RowLabels
from tikmix_fast.influence.parallel.fully_sharded import is_sharded
from tikmix_fast.influence.passes.influence_sink import InfluenceSink
from tikmix_fast.influence.queries.projection import back_project
from tikmix_fast.influence.queries.store import Queries
from tikmix_fast.influence.torch_private import tree_map

__all__ = ["Cell", "Verification", "recompute_cells", "verify_cells"]


@dataclass(frozen=True)
class Cell:
    """One (task, domain) cell: its captured and recomputed values, and |difference| / (|q_i| |g_j|)."""

    task: str
    domain: str
    captured: float
    recomputed: float
    error: float


@dataclass(frozen=True)
class Verification:
    """The recomputed cells; errors are shares of |q_i| |g_j|."""

    cells: tuple[Cell, ...]

    @property
    def max_error(self) -> float:
        """The largest error of all cells."""
        return max(cell.error for cell in self.cells)

    def __str__(self) -> str:
        lines = [
            f"{cell.task} / {cell.domain}: captured {cell.captured:.9g}, recomputed {cell.recomputed:.9g}, error "
            f"{cell.error:.1e}"
            for cell in self.cells
        ]
        return "\n".join([f"{len(self.cells)} cells, largest error {self.max_error:.1e} of |q| |g|", *lines])


def verify_cells(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    queries: Queries,
    labels: RowLabels,
    loss_per_row: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    *,
    names: tuple[Sequence[str], Sequence[str]],
    fused: bool,
    cells: int,
    seed: int,
) -> Verification:
    """Capture a batch, and recompute some of its cells; ``names`` are the task names and the domain names.

    Raises
    ------
    ValueError
        If the labels name one domain for the whole batch instead of one per row.
    RuntimeError
        If weights are sharded.
    """
    tasks, domains = names
    if not isinstance(labels.ids, Tensor):
        raise ValueError("ids must name the domain of every row for verify: pass a tensor of shape [B] or [B, S]")
    if any(map(is_sharded, parameters.values())):
        raise RuntimeError("verify needs the whole weights in one process: verify a small model before sharding it")
    combined = queries.by_task(len(tasks))
    sink = InfluenceSink(labels, combined, queries.projections)
    with captured_pass(model, parameters, sink, fused=fused) as (capture, _):
        loss_per_row(model, batch).sum().backward()
        capture.streams.join()
    total = sink.total()
    captured = torch.zeros(len(tasks), len(domains)) if total is None else total.cpu()
    present = sorted(set(labels.ids.flatten().tolist()))
    pairs = [(task, domain) for task in range(len(tasks)) for domain in present]
    chosen = sorted(pairs[each] for each in np.random.default_rng(seed).permutation(len(pairs))[:cells])
    combined |= {name: back_project(combined[name], each) for name, each in queries.projections.items()}
    recomputed = recompute_cells(model, loss_per_row, batch, labels.ids, parameters, combined, chosen)
    return Verification(
        tuple(
            Cell(
                tasks[task],
                domains[domain],
                float(captured[task, domain]),
                value,
                abs(float(captured[task, domain]) - value) / length if length > 0 else 0.0,
            )
            for (task, domain), (value, length) in zip(chosen, recomputed, strict=True)
        )
    )


class _Losses(nn.Module):
    """The user's loss as a module, so that `torch.func.functional_call` can replace its parameters."""

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
    """Return the derivative of a domain's summed loss along a query, and |q| |g|, for each chosen (query, domain).

    It runs in float64 on copies of the parameters, without the capture; the model stays untouched.

    Parameters
    ----------
    model : nn.Module
    loss_per_row : callable (model, batch) -> Tensor [B] or [B, S]
        The unreduced loss of every row or position.
    batch : any nesting of tensors
    row_domains : int64
        The domain of each loss; the shape of the losses.
    parameters, queries : mappings by parameter name
        Tensors [*shape] and [q, *shape].
    chosen : pairs (index of the query, index of the domain)
    """
    wide = tree_map(_double, batch)
    losses = _Losses(model, loss_per_row)
    names = {id(parameter): name for name, parameter in losses.named_parameters()}
    frozen = {name: _double(value.detach()) for name, value in (*losses.named_parameters(), *losses.named_buffers())}
    moving = {name: names[id(parameter)] for name, parameter in parameters.items()}
    point = {moving[name]: frozen.pop(moving[name]) for name in parameters}

    def losses_at(weights: Mapping[str, Tensor]) -> Tensor:
        values: Tensor = torch.func.functional_call(losses, {**frozen, **weights}, (wide,), tie_weights=True)
        return values

    results: dict[tuple[int, int], tuple[float, float]] = {}
    # Fused attention kernels have no forward-mode derivative. For other operations' derivatives torch uses its own
    # deprecated torch.jit, and warns; the kind of warning depends on the version.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit")
        for index in {query for query, _ in chosen}:
            direction = {moving[name]: queries[name][index].double() for name in parameters}
            slopes = torch.func.jvp(losses_at, (point,), (direction,))[1]
            if slopes.shape != row_domains.shape:
                raise ValueError(
                    f"loss_per_row must return losses of shape {list(row_domains.shape)}, as the ids; got "
                    f"{list(slopes.shape)}"
                )
            length = torch.stack([each.square().sum() for each in direction.values()]).sum().sqrt()
            for query, domain in chosen:
                if query != index:
                    continue
                members = row_domains.to(slopes.device) == domain
                leaves = {name: value.detach().requires_grad_() for name, value in point.items()}
                gradients = torch.autograd.grad(losses_at(leaves)[members].sum(), [*leaves.values()], allow_unused=True)
                norm = torch.stack([each.square().sum() for each in gradients if each is not None]).sum().sqrt()
                results[query, domain] = float(slopes[members].sum()), float(length * norm)
    return [results[pair] for pair in chosen]


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
