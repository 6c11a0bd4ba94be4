"""Task gradients on their way to queries: summed batch by batch, then preconditioned once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tikmix_fast import ops
from tikmix_fast.influence.preconditioners import Preconditioner

__all__ = ["Queries", "TaskGradients"]


@dataclass(frozen=True)
class Queries:
    """The preconditioned task gradients, frozen.

    Attributes
    ----------
    values : dict of str to Tensor [q, *parameter.shape]
        One query per task and split, by the name of the parameter; of a projected one [q, k_out, k_in].
    owners : list of int [q]
        The task of each query.
    weights : list of float [q]
        Its share of its task's target tokens.
    packed : dict of (str, torch.dtype) to PackedQueries
        Filled by `Recorder` as weights are met: a second copy of what `values` holds of them, kept until the refresh.
    projections : dict of str to LayerProjection
        The parameters that are measured through a projection.
    """

    values: dict[str, Tensor]
    owners: list[int]
    weights: list[float]
    packed: dict[tuple[str, torch.dtype], ops.PackedQueries] = field(default_factory=dict)
    projections: dict[str, ops.LayerProjection] = field(default_factory=dict)

    def by_task(self, n: int) -> dict[str, Tensor]:
        """Combine the splits of every task into its one query, [n, *parameter.shape] by name."""
        combined = {}
        for name, value in self.values.items():
            weights = value.new_tensor(self.weights).reshape(-1, *(1,) * (value.ndim - 1))
            owners = torch.tensor(self.owners, device=value.device)
            combined[name] = value.new_zeros(n, *value.shape[1:]).index_add_(0, owners, weights * value)
        return combined


class TaskGradients:
    """The summed gradients of the tasks' token losses, each task's batches dealt in turn into its splits.

    Parameters
    ----------
    names : sequence of str
        The tasks.
    splits : int
    """

    def __init__(self, names: Sequence[str], splits: int) -> None:
        self._names, self._splits = names, splits
        self._batches = [0] * len(names)
        self._sums: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._tokens: dict[tuple[int, int], float] = {}

    def add(self, task: int, gradients: Mapping[str, Tensor], tokens: float, factor: float) -> None:
        """Add one batch: ``factor`` times the gradients is the gradient of the summed loss of its ``tokens``."""
        split = task, self._batches[task] % self._splits
        sums = self._sums.setdefault(split, {})
        for name, gradient in gradients.items():
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            if name not in sums:
                sums[name] = torch.zeros(dense.shape, dtype=_accumulated(dense), device=dense.device)
            sums[name].add_(dense, alpha=factor)
        self._tokens[split] = self._tokens.get(split, 0.0) + tokens
        self._batches[task] += 1

    def freeze(
        self,
        parameters: Mapping[str, Tensor],
        preconditioner: Preconditioner,
        optimizer: Any,
        projections: dict[str, ops.LayerProjection],
    ) -> Queries:
        """Turn the means per target token into queries, parameter by parameter, freeing the sums as it goes.

        Raises
        ------
        RuntimeError
            If a task has no batch.
        """
        unmeasured = [name for name, count in zip(self._names, self._batches, strict=True) if not count]
        if unmeasured:
            raise RuntimeError(
                f"tasks come first: run engine.task(...) for {', '.join(map(repr, unmeasured))} before domains(...)"
            )
        preconditioner.prepare(parameters, optimizer)
        splits = sorted(self._sums)
        values: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            means = parameter.new_zeros((len(splits), *parameter.shape), dtype=_accumulated(parameter))
            for mean, split in zip(means, splits, strict=True):
                # A parameter that this split's batches did not reach has no gradient there.
                total = self._sums[split].pop(name, None)
                if total is not None:
                    torch.div(total, self._tokens[split], out=mean)
            values[name] = preconditioner.apply(name, means)
            if name in projections:
                values[name] = projections[name].project(values[name])
        of_task = {task: sum(self._tokens[split] for split in splits if split[0] == task) for task, _ in splits}
        owners, weights = [task for task, _ in splits], [self._tokens[s] / of_task[s[0]] for s in splits]
        return Queries(values, owners, weights, projections=projections)


def _accumulated(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
