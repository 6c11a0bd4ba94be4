"""Measure Group Influence around any ``loss.backward()``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tikmix_fast.influence.engine_reports import EngineReports
from tikmix_fast.influence.in_run.run import InRun
from tikmix_fast.influence.options import EngineOptions
from tikmix_fast.influence.parallel.ranks import ranks_of
from tikmix_fast.influence.passes.covered_parameters import CoveredParameters
from tikmix_fast.influence.passes.domain_ids import Ids
from tikmix_fast.influence.preconditioners.choose import make_preconditioner
from tikmix_fast.influence.preconditioners.protocol import Preconditioner
from tikmix_fast.influence.queries.projection import Projection
from tikmix_fast.influence.session import Session
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.matrix.stopping import Batch, until_known

__all__ = ["InfluenceEngine"]


class InfluenceEngine(EngineReports):
    """Measure how much a small step on each domain lowers the loss of each task, at the current weights.

    First run every task forward and backward inside `task`. Then run batches of the domains, mixed or not, inside
    `domains`. `matrix` returns S[i, j] = <P g_i, g_j>, where g is the mean gradient per target token (arXiv 2508.17677,
    Eq. 8, with the opposite sign, so that positive helps). The domain side is one ordinary backward pass that
    accumulates ``p.grad`` as usual, so it can be the training step itself.

    Memory: one gradient per task and split, and from the first `domains` on a second copy of those of weights, packed
    for the kernel. Memory does not grow with the number of domains. `memory_estimate` counts it before anything runs.

    Parameters
    ----------
    model : nn.Module
        The outermost wrapper that you call (DistributedDataParallel, compiled, ...). Compiled models run eagerly inside
        the contexts.
    domains, tasks : sequence of str
        The columns and the rows of the matrix.
    preconditioner : "adam", "identity", "ekfac", "diagonal_fisher" or Preconditioner
        P. "adam" scales by the optimizer's second moments; `fisher` fits "ekfac" and "diagonal_fisher".
    optimizer : torch.optim.Adam, AdamW, or a state dict with names
        "adam" reads it when the queries freeze, and does not change it.
    projection : Projection or None
        None: exact influence. Otherwise random projections measure the matrices of layers, and their ``p.grad`` is
        bit-identical to a backward without influence. Costs memory of dim x dim numbers per domain and weight, for the
        error bars.
    exclude : str or sequence of str
        Patterns (``fnmatch``) of parameter names to leave out; their influence counts as zero.
    reduction : "mean" or "sum"
        How the loss combines the target tokens of one batch. For other losses pass ``normalizer`` to `domains`.
    grad : "fused" or "ordinary"
        "fused": the influence kernel also computes a linear layer's weight gradient, as accurately as the ordinary
        product. "ordinary": the ordinary product computes it, and ``p.grad`` is bit-identical to a backward without
        influence.
    task_splits : int
        Number of splits of each task's batches, from which the task side's error is estimated (1: no estimate, and
        ``stderr`` is NaN). Costs as many gradients per task in memory.
    batch_dim : 0, 1 or None
        The batch dimension of activations: [B, S, ...] or [S, B, ...]. None means 0, but refuses mixed batches with as
        many sequences as positions, because their shapes are ambiguous.
    check_every : int
        Check conservation at the first micro-batch and then once per this number of micro-batches; 0: never.
    allow_stale : bool
        Allow weights to change after the queries froze. S is then not a slope at any weights.
    max_dropped_in_row : int
        So many non-finite micro-batches in a row raise, even with a GradScaler.
    queries_device : None, "cpu" or "auto"
        Where task gradients and queries rest. None: with their parameters. "cpu": those of matrices rest in pinned host
        memory, and each visits the GPU at its weight's turn in the backward, while the next one is copied. The results
        are the same. "auto": "cpu" if they do not fit on the GPU, decided and logged at the first task.
    process_group : ProcessGroup, "auto" or None
        The processes that measure one matrix together, each on its own batches. "auto": those of
        DistributedDataParallel around the model or of ``fully_shard``. None: this process alone. The matrix equals that
        of a single process with all the batches. Every rank must make the same calls of `refresh`, `matrix`,
        `state_dict` and the first `domains`, and have a batch of some task. Each rank stores (q + 1) x m numbers per
        micro-batch between two read-outs, q = tasks x ``task_splits``.
    share_queries : bool
        Each of R ranks stores one R-th of the task gradients and queries; a weight's queries are gathered at its turn
        in the backward. All ranks must then run every `task` and `domains` together, always at the same task, and their
        batches of it count as one batch.

    Raises
    ------
    ValueError, TypeError
        If a name is empty or repeated, an option is unknown, or a pattern of ``exclude`` matches nothing.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Linear(4, 1)
    >>> engine = InfluenceEngine(model, domains=["web", "code"], tasks=["qa"], preconditioner="identity")
    >>> with engine.task("qa"):
    ...     model(torch.ones(8, 4)).mean().backward()
    >>> with engine.domains(torch.tensor([0, 0, 1, 1])):
    ...     model(torch.ones(4, 4)).mean().backward()
    >>> engine.matrix().values
    array([[5., 5.]])
    """

    def __init__(
        self,
        model: nn.Module,
        domains: Sequence[str],
        tasks: Sequence[str],
        preconditioner: str | Preconditioner = "adam",
        optimizer: Any = None,
        projection: Projection | None = None,
        exclude: str | Sequence[str] = (),
        reduction: Literal["mean", "sum"] = "mean",
        grad: Literal["fused", "ordinary"] = "fused",
        *,
        task_splits: int = 2,
        batch_dim: Literal[0, 1] | None = None,
        check_every: int = 100,
        allow_stale: bool = False,
        max_dropped_in_row: int = 10,
        queries_device: Literal["cpu", "auto"] | torch.device | None = None,
        process_group: torch.distributed.ProcessGroup | Literal["auto"] | None = "auto",
        share_queries: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        options = EngineOptions(
            domains=domains,  # type: ignore[arg-type]  # the options make tuples of these three
            tasks=tasks,  # type: ignore[arg-type]
            projection=projection,
            exclude=exclude,  # type: ignore[arg-type]
            reduction=reduction,
            grad=grad,
            task_splits=task_splits,
            batch_dim=batch_dim,
            check_every=check_every,
            allow_stale=allow_stale,
            max_dropped_in_row=max_dropped_in_row,
            queries_device=queries_device,  # type: ignore[arg-type]
            share_queries=share_queries,
        )
        covered = CoveredParameters(model, options.exclude)
        device = next(iter(covered.parameters().values())).device
        self._session = Session(
            model,
            options,
            make_preconditioner(preconditioner),
            optimizer,
            covered,
            ranks_of(model, process_group, device),
        )

    def task(
        self, name: str, mask: Tensor | int | None = None, normalizer: float | None = None, *, scaler: Any = None
    ) -> AbstractContextManager[None]:
        """Add one batch of a task: run forward and backward inside. Call it any number of times before `domains`.

        ``p.grad`` stays as it was, even None. Costs the memory of one gradient.

        Parameters
        ----------
        name : str
        mask : bool [B, S] or [B], int, or None
            True where the logits enter the loss, or the number of such positions; None: all. `shifted_mask` makes the
            mask of models that shift labels themselves.
        normalizer : float, optional
            The divisor of the sum of the token losses; default: the target tokens for reduction "mean", 1 for "sum".
        scaler : torch.amp.GradScaler, optional
            If it scaled the loss.

        Raises
        ------
        ValueError
            If the task is unknown, or the mask disagrees with the cross-entropy that the model called.
        RuntimeError
            If the queries are frozen (call `refresh`), weights changed since the first task, or no backward ran.
        FloatingPointError
            If the gradient is not finite and no scaler explains it.
        """
        return self._session.task(name, mask, normalizer, scaler)

    def fisher(
        self,
        stage: Literal["factors", "eigenvalues"] = "eigenvalues",
        *,
        sequences: int | None = None,
        tokens: int | None = None,
    ) -> AbstractContextManager[None]:
        """Fit the Fisher matrix of "ekfac" or "diagonal_fisher" to one batch: run forward and backward inside.

        Do this before the first `domains`: run "factors" on some batches, then "eigenvalues" on the same or others
        ("diagonal_fisher" needs "eigenvalues" alone). Labels sampled from the model replace the data's labels in
        ``F.cross_entropy`` and ``F.nll_loss``, except ignored ones. Divisor and scale of the loss do not matter; leave
        out terms beside the cross-entropy. ``p.grad`` is untouched. Costs a forward and a backward and, per layer,
        products as large as theirs.

        Parameters
        ----------
        stage : "factors" or "eigenvalues"
        sequences : int, optional
            The number of sequences in the batch. Eigenvalues then come from per-sequence gradients, with less noise
            than from the whole batch's gradient.
        tokens : int, optional
            For losses other than cross-entropy: the number of targets, if you sampled the labels yourself and the loss
            is the *sum* of the negative log-likelihoods. The data's own labels give the empirical Fisher matrix.

        Raises
        ------
        RuntimeError
            If the preconditioner is of another kind, the stages are out of order, the queries are frozen, or the
            context ran no cross-entropy or no backward.
        ValueError
            If "factors" did not reach a layer, labels cannot be sampled (class weights), or ``tokens`` disagrees with
            the cross-entropy.
        FloatingPointError
            If the result is not finite; the fit is unchanged then.

        Examples
        --------
        >>> model = nn.Linear(4, 3)
        >>> engine = InfluenceEngine(model, ["web"], ["qa"], preconditioner="ekfac")
        >>> for stage in ("factors", "eigenvalues"):
        ...     with engine.fisher(stage, sequences=8):
        ...         nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.zeros(8, dtype=torch.long)).backward()
        """
        return self._session.fisher(stage, sequences, tokens)

    def domains(
        self, ids: Ids, mask: Tensor | int | None = None, normalizer: float | None = None, *, scaler: Any = None
    ) -> AbstractContextManager[None]:
        """Measure one micro-batch of domain data: run its forward and its backward inside.

        The backward is the ordinary one: ``p.grad`` accumulates as usual, and the influence of every domain in the
        batch is measured on the way. The first call freezes the queries. Costs one pass of the kernel per linear layer
        instead of the weight-gradient product. On a GPU the host waits once, when the context ends, and again to check
        conservation.

        Parameters
        ----------
        ids : str, int, int [B] or [B, S], or a sequence of B names or indices
            The domain of the batch, of every sequence, or of every position. Ids per position are exact only if
            attention does not cross documents.
        mask : bool [B, S] or [B], int, or None
            True where the logits enter the loss; None: at all positions. A count suffices for a batch of one domain.
        normalizer : float, optional
            The divisor of the sum of the token losses, accumulation steps included; default: the target tokens of this
            batch for reduction "mean", 1 for "sum".
        scaler : torch.amp.GradScaler, optional
            If it scaled the loss. A non-finite micro-batch is then dropped and counted.

        Raises
        ------
        ValueError
            If an id is unknown, the rows of an activation do not match the ids, or the mask disagrees with the
            cross-entropy.
        RuntimeError
            If a task has no batch yet, weights changed since the queries froze, or no backward ran inside.
        UncapturedParameterError
            If a trainable parameter got a gradient without being captured.
        ConservationError
            If the captured influence of a parameter disagrees with its gradient.
        FloatingPointError
            If the result is not finite without a scaler, or too often in a row with one.
        """
        return self._session.domains(ids, mask, normalizer, scaler)

    def matrix(self) -> InfluenceMatrix:
        """Return the influence measured so far, [n tasks, m domains], with its standard errors.

        Domains without a micro-batch are NaN. ``stderr`` is NaN if the domain or task had fewer than two micro-batches.

        Raises
        ------
        ValueError
            If a GPU kernel got invalid offsets.
        """
        return self._session.matrix()

    def run_until(self, batches: Iterable[Batch], rel_error: float = 0.2, *, least: int = 8) -> Iterator[Batch]:
        """Yield batches to measure inside `domains`, until the influence is known well enough for a mixture.

        Stops when `InfluenceMatrix.relative_error` of every task is at most ``rel_error`` and every domain has
        ``least`` micro-batches. (Repeated looks at few micro-batches would find a small error by chance.) Logs a
        warning if the batches end first, or if the tasks' own error is too large.

        Raises
        ------
        ValueError
            If ``rel_error`` is not above 0, ``least`` is below 2, or there are fewer than two domains.

        Examples
        --------
        >>> model = nn.Linear(4, 1)
        >>> engine = InfluenceEngine(model, ["web", "code"], ["qa"], preconditioner="identity")
        >>> for _ in range(2):
        ...     with engine.task("qa"):
        ...         model(torch.ones(8, 4)).mean().backward()
        >>> def loader():
        ...     while True:
        ...         yield torch.stack([torch.rand(4), 1 + torch.rand(4)])
        >>> for rows in engine.run_until(loader(), rel_error=0.3):
        ...     with engine.domains([0, 1]):
        ...         model(rows).mean().backward()
        """
        if len(self.domain_names) < 2:
            raise ValueError(
                f"domains must be at least two for run_until, which compares them; got {self.domain_names}"
            )
        return until_known(batches, self.matrix, rel_error, least)

    def in_run(
        self,
        every: int,
        tasks: Callable[[int], object],
        time_constant: float = math.inf,
        near_every: int = 0,
    ) -> InRun:
        """Measure in a training run, on its own mixed batches and fresh small task passes, once every ``every`` steps.

        `InRun` describes the arguments and shows a training loop; `plan` chooses ``every``.
        """
        return InRun(self._session, every, tasks, time_constant, near_every)

    def refresh(self, *, keep: float = 1.0) -> None:
        """Drop the queries, so that tasks can be measured at new weights; the influence so far stays.

        Parameters
        ----------
        keep : float
            Factor from 0 to 1 for the weight of everything measured so far. exp(-age / time constant) at every round
            makes an exponential average of the rounds.

        Raises
        ------
        ValueError
            If ``keep`` is out of range.
        """
        self._session.refresh(keep)

    def reset(self) -> None:
        """Forget everything that was measured."""
        self._session.reset()

    def state_dict(self, *, within_round: bool = False) -> dict[str, Any]:
        """Return the measurement as plain JSON types, without the queries: a resumed run measures its tasks again.

        The state is the same on all ranks, and any number of ranks may load it.

        Parameters
        ----------
        within_round : bool
            False: the resumed run may measure its tasks on any batches, at any weights. True: the resumed run must
            measure its tasks at the same weights, on the same batches in the same order. It then reaches the same
            matrix as an uninterrupted run, bit for bit (if torch's own results are reproducible). A projection adds
            tensors under "projected".
        """
        return self._session.state_dict(within_round=within_round)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`; the tasks must be measured again.

        Raises
        ------
        ValueError
            If kind, version, tasks, domains or preconditioner differ; nothing changes then.
        """
        self._session.load_state_dict(state)
