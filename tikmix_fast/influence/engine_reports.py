"""What an engine reports without measuring: names, coverage, memory, costs, and an independent check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tikmix_fast.arguments import require_int
from tikmix_fast.influence.in_run.plan import InRunPlan, plan_in_run
from tikmix_fast.influence.memory_estimate import MemoryEstimate
from tikmix_fast.influence.passes.coverage import Coverage
from tikmix_fast.influence.passes.domain_ids import Ids
from tikmix_fast.influence.passes.verify import Verification
from tikmix_fast.influence.preconditioners.protocol import Preconditioner
from tikmix_fast.influence.queries.projection import Projection
from tikmix_fast.influence.session import Session

__all__ = ["EngineReports"]


class EngineReports:
    """The methods of `InfluenceEngine` that do not measure."""

    _session: Session

    @property
    def model(self) -> nn.Module:
        """The model that is measured."""
        return self._session.model

    @property
    def domain_names(self) -> tuple[str, ...]:
        """The columns of the matrix."""
        return self._session.options.domains

    @property
    def task_names(self) -> tuple[str, ...]:
        """The rows of the matrix."""
        return self._session.options.tasks

    @property
    def preconditioner(self) -> Preconditioner:
        """The preconditioner P."""
        return self._session.preconditioner

    @property
    def projection(self) -> Projection | None:
        """The projection of layers' matrices, or None."""
        return self._session.options.projection

    @property
    def task_splits(self) -> int:
        """The number of splits of each task's batches."""
        return self._session.options.task_splits

    @property
    def dropped(self) -> int:
        """The number of this process's passes that were dropped because they were not finite."""
        return self._session.dropped

    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters that influence covers, by name: trainable, not excluded."""
        return self._session.covered.parameters()

    def coverage(self) -> Coverage:
        """Return which trainable parameters the influence covers; ``print`` shows it in one line."""
        return self._session.coverage()

    def memory_estimate(
        self,
        dtype: torch.dtype | None = None,
        tokens: int = 0,
        *,
        device: torch.device | str | None = None,
        queries_device: str | torch.device | None = None,
    ) -> MemoryEstimate:
        """Estimate before any pass how much memory the engine will take on a device, besides the model's own.

        Parameters
        ----------
        dtype : torch.dtype, optional
            The dtype of the rows that products read; autocast's, if the model runs under it. Default: the parameter's.
        tokens : int
            Rows of one micro-batch. With them, the estimate includes copies of activations in the backward.
        device : torch.device or str, optional
            Default: that of the first parameter.
        queries_device : "cpu" or "auto", optional
            Replaces the engine's own setting. "auto" counts as on the device until it is decided.

        Returns
        -------
        MemoryEstimate
            Within 10% of what the engine allocates, if batches fill all ``task_splits`` of every task. It counts
            gradients as they are now, because conservation copies each existing ``p.grad``. Add the kernels' scratch,
            and the memory of "ekfac" (its ``factor_memory``) or of your own preconditioner.

        Examples
        --------
        >>> from tikmix_fast import InfluenceEngine
        >>> engine = InfluenceEngine(nn.Linear(1000, 1000), ["web"], ["qa"], preconditioner="identity")
        >>> engine.memory_estimate().task_gradients  # two splits of one task, float32
        8008000
        """
        home = next(iter(self.parameters().values())).device if device is None else torch.device(device)
        rest = None if queries_device is None else str(queries_device)
        return self._session.placement.memory_estimate(dtype, tokens, home, rest)

    def plan(self, budget: float = 0.05, *, step_tokens: int, sequence_tokens: int, **options: Any) -> InRunPlan:
        """Plan how often `in_run` measures, and on how much of each task; nothing runs.

        `plan_in_run` describes ``options``: micro_batches, near_every, flops_per_byte, matrix, task_tokens and
        time_constant.

        Parameters
        ----------
        budget : float
            Largest extra cost, as a share of that of training: 0.05 for 5%.
        step_tokens : int
            Tokens of one optimizer step, all micro-batches and ranks together.
        sequence_tokens : int
            Tokens of one sequence of a task.

        Raises
        ------
        ValueError
            If a number is out of range.

        Examples
        --------
        >>> from tikmix_fast import InfluenceEngine
        >>> engine = InfluenceEngine(nn.Linear(64, 64), ["web", "code"], ["qa"], preconditioner="identity")
        >>> plan = engine.plan(budget=0.05, step_tokens=32768, sequence_tokens=1024)
        >>> plan.every, plan.task_sequences, plan.overhead <= 0.05
        (2, 2, True)
        """
        n, m = self._session.options.shape
        return plan_in_run(
            budget,
            tasks=n,
            splits=self.task_splits,
            domains=m,
            step_tokens=step_tokens,
            sequence_tokens=sequence_tokens,
            **options,
        )

    def verify(
        self, loss_per_row: Callable[[nn.Module, Any], Tensor], batch: Any, ids: Ids, cells: int = 4, seed: int = 0
    ) -> Verification:
        """Recompute random cells on one batch by forward-mode derivatives in float64, independently of the capture.

        For the comparison the batch is captured once more, without adding to the matrix or to ``p.grad``. With a
        projection, the derivatives run along P_out^T q P_in of the projected queries q, so this verifies the capture,
        not the projection's error. All queries come to the device at once. Switch dropout off before
        (``model.eval()``). Costs float64 copies of the parameters and a few passes over the batch.

        Parameters
        ----------
        loss_per_row : callable (model, batch) -> Tensor [B] or [B, S]
            The loss of every sequence or position, of the same shape as the ids.
        batch : any nesting of tensors
        ids : int [B] or [B, S], or a sequence of B names or indices
        cells : int
            The number of (task, domain) cells to recompute, among the domains in the batch.
        seed : int
            Chooses the cells.

        Returns
        -------
        Verification
            ``max_error`` is the largest ``|difference| / (|q_i| |g_j|)``: about 1e-7 for a correctly captured float32
            model.

        Raises
        ------
        RuntimeError
            If no queries are frozen yet.
        """
        require_int("cells", cells, 1)
        return self._session.verify(loss_per_row, batch, ids, cells, seed)
