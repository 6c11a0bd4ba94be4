"""Group Influence around anybody's ``loss.backward()``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tikmix_fast import ops
from tikmix_fast.influence.capture.capture import Capture
from tikmix_fast.influence.capture.rows import RowLabels
from tikmix_fast.influence.capture.views import UncapturedParameterError
from tikmix_fast.influence.in_run.plan import InRunPlan, plan_in_run
from tikmix_fast.influence.in_run.run import InRun
from tikmix_fast.influence.in_run.staleness import QuerySketch, Watched
from tikmix_fast.influence.loss.loss_scale import LossScale, check_targets
from tikmix_fast.influence.loss.target_tokens import check_mask, count_target_tokens, masked_targets
from tikmix_fast.influence.loss.watch import SeenLosses, watch_losses
from tikmix_fast.influence.memory_estimate import MemoryEstimate, estimate_memory, readable_size
from tikmix_fast.influence.parallel.fully_sharded import WholeGradients, check_sharding, is_sharded, reshard
from tikmix_fast.influence.parallel.gradients import (
    GradientBefore,
    gradients_set_aside,
    local_gradients,
    synchronises,
    without_synchronisation,
)
from tikmix_fast.influence.parallel.ranks import PendingMicrobatches, add_by_name, ranks_of
from tikmix_fast.influence.parallel.transfers import read_together
from tikmix_fast.influence.passes.conservation import check_conservation
from tikmix_fast.influence.passes.coverage import Coverage
from tikmix_fast.influence.passes.fingerprint import Weights
from tikmix_fast.influence.passes.recorder import Recorder
from tikmix_fast.influence.passes.verify import Cell, Verification, recompute_cells
from tikmix_fast.influence.preconditioners.adam import Adam, Preconditioner, make_preconditioner
from tikmix_fast.influence.preconditioners.ekfac import EKFAC
from tikmix_fast.influence.preconditioners.optimizer_state import canonical_name
from tikmix_fast.influence.queries import offload
from tikmix_fast.influence.queries.held import Queries, TaskGradients
from tikmix_fast.influence.queries.offload import Copier
from tikmix_fast.influence.queries.projection import Projection, back_project
from tikmix_fast.matrix.estimator import Estimator
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.matrix.stopping import Batch, until_known
from tikmix_fast.ops.common.device_checks import raise_on_device_errors

__all__ = ["InfluenceEngine"]

_LOG = logging.getLogger("tikmix_fast")
_FORMAT = "tikmix_fast.influence_engine"
_VERSION = 1

Ids = str | int | Tensor | Sequence[str] | Sequence[int]


class InfluenceEngine:
    """Measure how much a small step on each domain lowers the loss of each task, at the current weights.

    First every task runs forward and backward inside `task`, then batches of the domains (mixed or not) inside
    `domains`; `matrix` gives S[i, j] = <P g_i, g_j> with g the mean gradient per target token (method: arXiv
    2508.17677, Eq. 8, with the sign turned so that positive helps). The domain side is one ordinary backward pass: its
    gradients land in ``p.grad`` as usual, so it may be the training step itself. Memory: one gradient per task and
    split, and from the first `domains` on those of the weights once more, packed for the kernel; nothing that grows
    with the number of domains. `memory_estimate` tells how much before anything runs, ``queries_device`` moves it to
    the host.

    Parameters
    ----------
    model : nn.Module
        The outermost wrapper that is called (DistributedDataParallel, compiled, ...). Compiled models run as written
        inside the contexts.
    domains, tasks : sequence of str
        The columns and the rows of the matrix.
    preconditioner : "adam", "identity", "ekfac", "diagonal_fisher" or Preconditioner
        P. "adam" scales by the optimizer's own second moments; "ekfac" and "diagonal_fisher" are fitted by `fisher`.
    optimizer : torch.optim.Adam, AdamW, or a state dict with names
        Read by "adam" when the queries freeze, never changed.
    projection : Projection or None
        None: exact influence. Otherwise the matrices of layers are measured through random projections, and their
        ``p.grad`` is bit-identical to a backward without influence there. Costs dim x dim numbers per domain and weight
        in memory, for the error bars.
    exclude : str or sequence of str
        Patterns (``fnmatch``) of parameter names to leave out; their influence counts as zero.
    reduction : "mean" or "sum"
        How the loss combines the target tokens of one batch; see ``normalizer`` of `domains` for anything else.
    grad : "fused" or "ordinary"
        "fused": a linear layer's weight gradient comes from the influence kernel's own pass, as accurate as the
        ordinary one. "ordinary": the product is computed a second time and ``p.grad`` is bit-identical to a backward
        without influence.
    task_splits : int
        Into how many splits a task's batches are dealt, to estimate the task side's own error (1: not estimated,
        ``stderr`` is NaN). Costs that many gradients per task in memory.
    batch_dim : 0, 1 or None
        Where activations have their batch dimension: [B, S, ...] or [S, B, ...]. None is 0; a batch that mixes domains
        and has as many sequences as positions is then refused, because shapes do not tell which is which.
    check_every : int
        Every how many micro-batches conservation is checked, the first included; 0 never.
    allow_stale : bool
        Allow weights that changed since the queries froze. Queries even 5 steps old rank domains no better than chance.
    max_dropped_in_row : int
        Non-finite micro-batches in a row that a GradScaler may explain; more raise.
    queries_device : None, "cpu" or "auto"
        Where task gradients and queries rest. None: with their parameters. "cpu": those of matrices in pinned host
        memory; each visits the GPU when its weight's turn comes, the next one on its way meanwhile, with the same
        results. "auto": "cpu" where they do not fit on the GPU, decided (and logged) at the first task; see
        `memory_estimate`. Means nothing for parameters on the CPU.
    process_group : ProcessGroup, "auto" or None
        The processes that measure one matrix together, each on batches of its own; "auto": those of
        DistributedDataParallel around the model or of ``fully_shard``; None: this one alone. The queries are then
        those of all ranks' task batches (summed when they freeze), the matrix that of all their micro-batches (gathered
        when it is read): what one process with all of it would find, whichever rank had which domain. Every rank makes
        the same calls of `refresh`, `matrix`, `state_dict` and the first `domains`, has at least one batch of some
        task, and keeps (q + 1) x m numbers per micro-batch between two read-outs, q = tasks x ``task_splits``. A rank
        that stops makes the others raise when the group's timeout is over.
    share_queries : bool
        Of R ranks each holds one R-th of the task gradients and of the queries; the queries of a weight are gathered
        when its turn in the backward comes. All ranks then run every `task` and `domains` together, as under
        ``fully_shard`` they do anyhow, and are at the same task at a time; their batches of it count as one in a split.

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

    _queries: Queries | None
    _weights: Weights | None
    _projected: dict[str, Tensor]

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
        queries_device: str | torch.device | None = None,
        process_group: torch.distributed.ProcessGroup | Literal["auto"] | None = "auto",
        share_queries: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        if projection is not None and not isinstance(projection, Projection):
            raise TypeError(f"projection must be a tikmix_fast.Projection or None; got {projection!r}")
        _require_choice("reduction", reduction, ("mean", "sum"))
        _require_choice("grad", grad, ("fused", "ordinary"))
        _require_choice("batch_dim", batch_dim, (None, 0, 1))
        if queries_device is not None and str(queries_device) not in ("cpu", "auto"):
            raise ValueError(f"queries_device must be None, 'cpu' or 'auto'; got {queries_device!r}")
        if share_queries and queries_device is not None:
            raise ValueError(f"queries_device must be None with share_queries; got {queries_device!r}")
        _require_count("task_splits", task_splits, 1)
        _require_count("check_every", check_every, 0)
        _require_count("max_dropped_in_row", max_dropped_in_row, 1)
        self.model = model
        self.domain_names = _names("domains", domains)
        self.task_names = _names("tasks", tasks)
        self.preconditioner = make_preconditioner(preconditioner)
        self.optimizer = optimizer
        self.projection = projection
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self.reduction, self.grad = reduction, grad
        self.task_splits, self.batch_dim, self.check_every = task_splits, batch_dim, check_every
        self.allow_stale, self.max_dropped_in_row = allow_stale, max_dropped_in_row
        self.queries_device = None if queries_device is None else str(queries_device)
        self.dropped = 0
        self._estimator = Estimator(len(self.task_names), len(self.domain_names))
        self._begin_projections()
        self._captured: set[str] = set()
        self._open = False
        self._passes = 0
        self._dropped_in_row = 0
        self._copiers: dict[torch.device, Copier] | None = None  # not decided yet
        self._sketch: QuerySketch | None = None  # sees the queries when they freeze
        everything = [name for name, _ in self._trainable()]
        for pattern in self.exclude:
            if not any(fnmatchcase(name, pattern) for name in everything):
                raise ValueError(
                    f"exclude pattern {pattern!r} matches no trainable parameter; there are: "
                    f"{', '.join(everything) or 'none'}"
                )
        for name, parameter in self.parameters().items():
            if parameter.is_complex():
                raise TypeError(f"{name!r} is complex, which influence is not defined for: leave it out with exclude=")
        if not self.parameters():
            raise ValueError("model must have a trainable parameter that is not excluded")
        self._ranks = ranks_of(model, process_group, next(iter(self.parameters().values())).device)
        self.share_queries = bool(share_queries) and self._ranks is not None
        self._begin_tasks()

    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters that influence covers, by name: trainable, not excluded."""
        return {name: value for name, value in self._trainable() if not self._is_excluded(name)}

    @contextmanager
    def task(
        self, name: str, mask: Tensor | int | None = None, normalizer: float | None = None, *, scaler: Any = None
    ) -> Iterator[None]:
        """Add one batch of a task: run forward and backward inside, any number of times before the first `domains`.

        ``p.grad`` is untouched: what it held (None included) is back afterwards. Needs as much memory as one gradient.

        Parameters
        ----------
        name : str
        mask : bool [B, S] or [B], int, or None
            Where the logits enter the loss, or how many positions do; None = all. `shifted_mask` makes it for models
            that shift labels themselves.
        normalizer : float, optional
            What the sum of the token losses was divided by; default: the target tokens for reduction "mean", 1 for
            "sum".
        scaler : torch.amp.GradScaler, optional
            If the loss was scaled by it.

        Raises
        ------
        ValueError
            If the task is unknown, or the mask disagrees with the cross-entropy that the model called.
        RuntimeError
            If the queries are frozen already (call `refresh`), weights changed since the first task, or no backward
            ran.
        FloatingPointError
            If the gradient is not finite and no scaler explains it.
        """
        index = self._index_of("task", name, self.task_names)
        self._require_idle()
        if self._queries is not None:
            raise RuntimeError(
                "the queries are frozen since the first domains(...): call engine.refresh() before new tasks"
            )
        labels = RowLabels(0, 1, self.batch_dim)
        check_mask(mask, labels)
        scale = LossScale(normalizer, scaler)
        parameters = self.parameters()
        self._check_parameters(parameters)
        weights = Weights(parameters)
        stale = self._stale_flags(weights, "the first task")
        if self._copiers is None:
            self._copiers = self._choose_copiers()
            self._tasks = TaskGradients(
                self.task_names, self.task_splits, self._copiers, self._ranks, self.share_queries
            )
        taken = WholeGradients(parameters, take=True, keep=True)
        capture = Capture(self.model, parameters, None, fused=False, watch=taken.watch)
        with ExitStack() as stack:
            stack.enter_context(taken.open())
            self._enter(stack)
            stack.enter_context(gradients_set_aside(self.model))
            stack.enter_context(without_synchronisation(self.model))
            seen = stack.enter_context(watch_losses())
            stack.enter_context(capture.open())
            yield
            gradients = {
                name: p.grad.detach() for name, p in parameters.items() if p.grad is not None and not is_sharded(p)
            }
            gradients |= taken.found
            if taken.unseen():
                raise _not_captured(taken.unseen())
            if not gradients:
                raise RuntimeError(f"no gradient reached a parameter inside task({name!r}): run loss.backward() in it")
            capture.streams.join(gradients.values())
            found = read_together(
                {
                    **_unread(stale, weights, parameters, labels, mask, seen, scale),
                    "sums": [_sum(each) for each in gradients.values()],
                }
            )
            self._check_stale(found["stale"], "the first task")
            self._check_stepping(found["stepped"], "task")
            tokens = count_target_tokens(labels, mask, capture.rows, found["masked"])
            factor = scale.factor(float(tokens.sum()), self.reduction, found["scale"])
            finite = self._tasks.all_usable(index, _all_finite(found["sums"], gradients.values()))
            if self._drop_if_not_finite(finite, f"task {name!r}", scaler):
                return
            check_targets(tokens, factor, found["losses"], mask)
            self._tasks.add(index, gradients, float(tokens[0]), factor, parameters)
            self._weights = weights

    @contextmanager
    def fisher(
        self,
        stage: Literal["factors", "eigenvalues"] = "eigenvalues",
        *,
        sequences: int | None = None,
        tokens: int | None = None,
    ) -> Iterator[None]:
        """Fit the Fisher matrix of "ekfac" or "diagonal_fisher" to one batch: run forward and backward inside.

        Before the first `domains`: "factors" for a number of batches, then "eigenvalues" for the same or others
        ("diagonal_fisher" needs the second alone). The labels that ``F.cross_entropy`` or ``F.nll_loss`` compares with
        are replaced by labels sampled from the model wherever they are not ignored. What the loss is divided or scaled
        by does not matter, as every target that it depends on counts once; terms beside the cross-entropy must be left
        out. ``p.grad`` is untouched. Costs a forward and a backward and, per layer, products as large as these.

        Parameters
        ----------
        stage : "factors" or "eigenvalues"
        sequences : int, optional
            How many sequences the batch has: eigenvalues then come from per-sequence gradients, with less noise than
            from the gradient of the whole batch.
        tokens : int, optional
            For losses other than cross-entropy: you sampled the labels yourself, and the loss is the *sum* of the
            negative log-likelihoods of so many targets. With the data's own labels it is the empirical Fisher matrix.

        Raises
        ------
        RuntimeError
            If the preconditioner is of another kind, the stages are out of order, the queries are frozen, or no
            cross-entropy or no backward was seen.
        ValueError
            If a layer had no part in "factors", labels cannot be sampled (class weights), or ``tokens`` disagrees with
            a cross-entropy that was seen.
        FloatingPointError
            If the result is not finite; nothing of the batch is kept then.

        Examples
        --------
        >>> model = nn.Linear(4, 3)
        >>> engine = InfluenceEngine(model, ["web"], ["qa"], preconditioner="ekfac")
        >>> for stage in ("factors", "eigenvalues"):
        ...     with engine.fisher(stage, sequences=8):
        ...         nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.zeros(8, dtype=torch.long)).backward()
        """
        self._require_idle()
        if self._ranks is not None or any(map(is_sharded, self.parameters().values())):
            raise RuntimeError(
                "fisher(...) fits on one process: fit with process_group=None, save the preconditioner, and give every "
                "rank an engine with what EKFAC.load or DiagonalFisher.load returns"
            )
        if not isinstance(self.preconditioner, EKFAC):
            raise RuntimeError(
                "fisher(...) fits preconditioner='ekfac' or 'diagonal_fisher'; this engine's is "
                f"{self.preconditioner.name!r}"
            )
        if self._queries is not None:
            raise RuntimeError(
                "the queries are frozen since the first domains(...): call engine.refresh() before fisher"
            )
        parameters = self.parameters()
        self._check_parameters(parameters)
        options = {"sequences": sequences, "tokens": tokens, "batch_dim": self.batch_dim}
        with ExitStack() as stack:
            self._enter(stack)
            stack.enter_context(self.preconditioner.observe(self.model, parameters, stage, **options))
            yield

    @contextmanager
    def domains(
        self, ids: Ids, mask: Tensor | int | None = None, normalizer: float | None = None, *, scaler: Any = None
    ) -> Iterator[None]:
        """Measure one micro-batch of domain data: run its forward and its backward inside.

        The backward is the ordinary one: ``p.grad`` accumulates as usual, and with it comes the influence of every
        domain in the batch. The first call freezes the queries. The cost is one pass of the kernel per linear layer
        instead of the weight-gradient product. On a GPU the host waits for the device once, when the context ends
        (besides: where ids are a tensor on the GPU, in the first call, and where conservation is checked).

        Parameters
        ----------
        ids : str, int, int [B] or [B, S], or a sequence of B names or indices
            The domain of the batch, of every sequence, or of every position. Per position is exact only where attention
            does not cross documents.
        mask : bool [B, S] or [B], int, or None
            Where the logits enter the loss; None = at all positions. A count is enough for a batch of one domain.
        normalizer : float, optional
            What the sum of the token losses was divided by, accumulation steps included; default: the target tokens of
            this batch for reduction "mean", 1 for "sum".
        scaler : torch.amp.GradScaler, optional
            If the loss was scaled by it; then a micro-batch that is not finite is dropped and counted.

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
            If what was captured of a parameter is not what its gradient holds.
        FloatingPointError
            If the result is not finite and no scaler explains it, or too often in a row.
        """
        self._require_idle()
        labels = self._labels(ids, mask)
        check_mask(mask, labels)
        scale = LossScale(normalizer, scaler)
        parameters = self.parameters()
        self._check_parameters(parameters)
        weights = Weights(parameters)
        stale = [] if self.allow_stale else self._stale_flags(weights, "the tasks were measured")
        if self._queries is None:
            projections = self.projection.layers(self.model, parameters, self._refreshes) if self.projection else {}
            preconditioner = self.preconditioner if self._sketch is None else Watched(self.preconditioner, self._sketch)
            queries = self._tasks.freeze(parameters, preconditioner, self.optimizer, projections)
            self._estimator.begin_round(queries.owners, queries.weights)
            self._queries = queries
        held = self._queries.held
        checking = self.check_every > 0 and self._passes % self.check_every == 0
        reduced = checking and synchronises(self.model)
        own = {name: p for name, p in parameters.items() if not is_sharded(p)}
        before = {name: GradientBefore(p, checking and not reduced) for name, p in own.items()}
        gradients = WholeGradients(parameters, take=False, keep=checking)
        recorder = Recorder(labels, held, self._queries.projections)
        capture = Capture(self.model, parameters, recorder, fused=self.grad == "fused", watch=gradients.watch)
        with ExitStack() as stack:
            self._enter(stack)
            seen = stack.enter_context(watch_losses())
            local = stack.enter_context(local_gradients(own)) if reduced else {}
            stack.enter_context(gradients.open())
            stack.enter_context(capture.open())
            held.begin_pass()
            yield
        capture.streams.join()
        # Whatever the host has to know comes in one copy: until here it did not wait for the device.
        sums = list(recorder.sums.values())
        found = read_together(
            {
                **_unread(stale, weights, parameters, labels, mask, seen, scale),
                "products": [torch.stack([each.to(sums[0].device) for each in sums]).sum(0)] if sums else [],
            }
        )
        self._check_stale(found["stale"], "the tasks were measured")
        self._check_stepping(found["stepped"], "domains")
        touched = [name for name, p in own.items() if before[name].touched(p)]
        self._check_captured([*touched, *gradients.touched, *gradients.unseen()], recorder)
        tokens = count_target_tokens(labels, mask, capture.rows, found["masked"])
        factor = scale.factor(float(tokens.sum()), self.reduction, found["scale"])
        products = found["products"][0].numpy() * factor
        if self._drop_if_not_finite(bool(np.isfinite(products).all()), "a micro-batch of domains", scaler):
            return
        check_targets(tokens, factor, found["losses"], mask)
        if checking:
            low = any(p.dtype in _HALF for p in parameters.values()) or recorder.saw_half
            tolerance = 2e-2 if low else 1e-3
            kept = {} if reduced else {name: before[name].kept(p) for name, p in own.items()}
            after = {**(local if reduced else {name: p.grad for name, p in own.items()}), **gradients.found}
            check_conservation(recorder.sums, held, kept, after, tolerance, self._queries.projections)
        projected = {name: gradients.mul_(factor) for name, gradients in recorder.projected.items()}
        if self._ranks is None:
            self._estimator.add(products, tokens)
            add_by_name(self._projected, projected)
        else:
            self._pending.add(products, tokens, projected)
        self._captured |= set(recorder.sums)
        self._passes += 1
        if self._passes == 1:
            coverage = self.coverage()
            _LOG.log(logging.INFO if coverage.share == 1 else logging.WARNING, "%s", coverage)

    def matrix(self) -> InfluenceMatrix:
        """Return the influence measured so far, [n tasks, m domains], with its standard errors.

        A domain never measured is NaN. ``stderr`` is NaN where a domain or a task had fewer than two micro-batches.

        Raises
        ------
        ValueError
            If a kernel on a GPU met offsets that it could not use.
        """
        raise_on_device_errors()
        dropped = self._tell_ranks()
        settings = {
            "preconditioner": self.preconditioner.name,
            "task_splits": self.task_splits,
            "excluded": self._excluded(),
            "reference_lr": getattr(self.preconditioner, "reference_lr", None),
            "projection": self._projection_settings(),
        }
        variance = None if self.projection is None else self._projection_variance()
        return self._estimator.matrix(self.task_names, self.domain_names, dropped, settings, variance)

    def run_until(self, batches: Iterable[Batch], rel_error: float = 0.2, *, least: int = 8) -> Iterator[Batch]:
        """Yield batches to measure inside `domains`, until the influence is known well enough for a mixture.

        That is when `InfluenceMatrix.relative_error` of every task is at most ``rel_error``, and every domain has
        ``least`` micro-batches: as the errors are looked at again and again, few would look good by chance. Ends with a
        warning in the log where the batches end, or where the tasks' own error is too large for it.

        Raises
        ------
        ValueError
            If ``rel_error`` is not above 0, ``least`` is below 2, or there are fewer than two domains to tell apart.

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
                f"domains must be at least two for run_until, which looks at how they differ; got {self.domain_names}"
            )
        return until_known(batches, self.matrix, rel_error, least)

    def plan(
        self,
        budget: float = 0.05,
        *,
        step_tokens: int,
        sequence_tokens: int,
        micro_batches: int = 1,
        near_every: int = 8,
        flops_per_byte: float = 20.0,
        matrix: InfluenceMatrix | None = None,
        task_tokens: int | None = None,
        time_constant: float = math.inf,
    ) -> InRunPlan:
        """Choose how often `in_run` measures, and on how much of each task, by counting; nothing runs.

        Measuring is as frequent as the budget allows, on the fewest sequences of a task that tell its error (one per
        split): the domain side is nearly free, so many small measured steps see more of it than few large ones.

        Parameters
        ----------
        budget : float
            Largest extra cost, as a share of that of training: 0.05 for 5%.
        step_tokens : int
            Tokens of one optimizer step, all micro-batches and ranks together.
        sequence_tokens : int
            Tokens of one sequence of a task.
        micro_batches : int
            Micro-batches per optimizer step.
        near_every : int
            As for `in_run`.
        flops_per_byte : float
            Operations that the machine does in the time of moving one byte of memory: about 10 to 30 for float32 on
            CPUs, 100 to 300 for bfloat16 on large GPUs.
        matrix : InfluenceMatrix, optional
            Of an earlier measurement, with its own errors: the plan then tells what noise to expect.
        task_tokens : int, optional
            Tokens of each task that ``matrix`` was measured on.
        time_constant : float
            Of the average, in optimizer steps, for that noise; infinite: that of a thousand measured steps.

        Returns
        -------
        InRunPlan
            ``every``, ``task_sequences``, the predicted overhead with its parts; ``print`` gives it in words.

        Raises
        ------
        ValueError
            If a number is out of range, or ``matrix`` comes without errors or without ``task_tokens``.

        Examples
        --------
        >>> engine = InfluenceEngine(nn.Linear(64, 64), ["web", "code"], ["qa"], preconditioner="identity")
        >>> plan = engine.plan(budget=0.05, step_tokens=32768, sequence_tokens=1024)
        >>> plan.every, plan.task_sequences, plan.overhead <= 0.05
        (2, 2, True)
        """
        return plan_in_run(
            budget,
            tasks=len(self.task_names),
            splits=self.task_splits,
            domains=len(self.domain_names),
            step_tokens=step_tokens,
            sequence_tokens=sequence_tokens,
            micro_batches=micro_batches,
            near_every=near_every,
            flops_per_byte=flops_per_byte,
            earlier=None if matrix is None else (matrix, task_tokens),
            time_constant=time_constant,
        )

    def in_run(
        self,
        every: int,
        tasks: Callable[[int], object],
        time_constant: float = math.inf,
        near_every: int = 8,
    ) -> InRun:
        """Measure in a training run, from its own mixed batches: every so many steps, with fresh small task passes.

        See `InRun` for the arguments, for how the training loop uses what this returns, and for an example; `plan`
        chooses ``every``.
        """
        return InRun(self, every, tasks, time_constant, near_every)

    def memory_estimate(
        self,
        dtype: torch.dtype | None = None,
        tokens: int = 0,
        *,
        device: torch.device | str | None = None,
        queries_device: str | torch.device | None = None,
    ) -> MemoryEstimate:
        """Tell before any pass how much memory the engine will take on a device, besides what the model takes.

        Parameters
        ----------
        dtype : torch.dtype, optional
            Of the rows that products see: that of autocast where the model runs under it. Default: the parameter's.
        tokens : int
            Rows of one micro-batch; with them the copies of activations in the backward are counted too.
        device : torch.device or str, optional
            Default: that of the first parameter.
        queries_device : "cpu" or "auto", optional
            Other than the engine's own. "auto" means resting on the device, as long as it is not decided.

        Returns
        -------
        MemoryEstimate
            For batches that fill all ``task_splits`` of every task, and gradients as they are now (a ``p.grad`` that is
            kept is copied where conservation is checked). Within 10% of what the engine allocates; the kernels' own
            scratch, and what "ekfac" (its ``factor_memory``) or a preconditioner of your own needs, come on top.

        Examples
        --------
        >>> engine = InfluenceEngine(nn.Linear(1000, 1000), ["web"], ["qa"], preconditioner="identity")
        >>> engine.memory_estimate().task_gradients  # two splits of one task, float32
        8008000
        """
        parameters = self.parameters()
        home = next(iter(parameters.values())).device if device is None else torch.device(device)
        asked = self.queries_device if queries_device is None else str(queries_device)
        away = asked == "cpu" and home.type != "cpu"
        if queries_device is None and self._copiers is not None:
            away = home in self._copiers
        return estimate_memory(
            self.model,
            {name: p for name, p in parameters.items() if p.device == home},
            queries=len(self.task_names) * self.task_splits,
            domains=len(self.domain_names),
            projection=self.projection,
            adam=isinstance(self.preconditioner, Adam),
            away=away,
            shares=self._ranks.size if self.share_queries and self._ranks is not None else 1,
            checked=self.check_every > 0,
            dtype=dtype,
            tokens=tokens,
        )

    def coverage(self) -> Coverage:
        """Tell which trainable parameters the influence covers; ``print(engine.coverage())`` gives one line."""
        captured: dict[str, int] = {}
        excluded: dict[str, int] = {}
        silent: dict[str, int] = {}
        for name, parameter in self._trainable():
            part = excluded if self._is_excluded(name) else captured if name in self._captured else silent
            part[name] = parameter.numel()
        return Coverage(captured, excluded, silent)

    def verify(
        self, loss_per_row: Callable[[nn.Module, Any], Tensor], batch: Any, ids: Ids, cells: int = 4, seed: int = 0
    ) -> Verification:
        """Recompute random cells on one batch by forward-mode derivatives in float64, independently of the capture.

        The batch is captured once more for the comparison; nothing of it enters the matrix, and ``p.grad`` is
        untouched. Where influence is projected, the derivatives are taken along P_out^T q P_in of the projected queries
        q, whose exact influence the projected one is: what is verified is the capture, not the projection's error.
        Queries that rest in host memory are all brought to the device for it. Switch dropout off before
        (``model.eval()``). Costs float64 copies of the parameters and a few passes over the batch.

        Parameters
        ----------
        loss_per_row : callable (model, batch) -> Tensor [B] or [B, S]
            The loss of every sequence or position, of the same shape as the ids.
        batch : any nesting of tensors
        ids : int [B] or [B, S], or a sequence of B names or indices
        cells : int
            How many (task, domain) cells to recompute, among the domains in the batch.
        seed : int
            Which cells.

        Returns
        -------
        Verification
            ``max_error`` is the largest ``|difference| / (|q_i| |g_j|)``: about 1e-7 for a float32 model that is
            covered rightly.

        Raises
        ------
        RuntimeError
            If no queries are frozen yet.
        """
        self._require_idle()
        _require_count("cells", cells, 1)
        if self._queries is None:
            raise RuntimeError("verify needs frozen queries: run task(...) for every task and one domains(...) first")
        labels = self._labels(ids, None)
        if not isinstance(labels.ids, Tensor):
            raise ValueError("ids must name the domain of every row for verify: pass a tensor of shape [B] or [B, S]")
        parameters = self.parameters()
        if any(map(is_sharded, parameters.values())):
            raise RuntimeError("verify needs the whole weights in one process: verify a small model before sharding it")
        queries = self._queries.by_task(len(self.task_names))
        projections = self._queries.projections
        recorder = Recorder(labels, queries, projections)
        with gradients_set_aside(self.model), without_synchronisation(self.model):
            capture = Capture(self.model, parameters, recorder, fused=self.grad == "fused")
            with capture.open():
                loss_per_row(self.model, batch).sum().backward()
            capture.streams.join()
            sums = list(recorder.sums.values())
            captured = torch.stack([each.to(sums[0].device) for each in sums]).sum(0).cpu()
        present = sorted(set(labels.ids.flatten().tolist()))
        every = [(task, domain) for task in range(len(self.task_names)) for domain in present]
        order = np.random.default_rng(seed).permutation(len(every))[:cells]
        chosen = sorted(every[each] for each in order)
        queries |= {name: back_project(queries[name], each) for name, each in projections.items()}
        found = recompute_cells(self.model, loss_per_row, batch, labels.ids, parameters, queries, chosen)
        return Verification(
            tuple(
                Cell(
                    self.task_names[task],
                    self.domain_names[domain],
                    float(captured[task, domain]),
                    value,
                    abs(float(captured[task, domain]) - value) / length if length > 0 else 0.0,
                )
                for (task, domain), (value, length) in zip(chosen, found, strict=True)
            )
        )

    def refresh(self, *, keep: float = 1.0) -> None:
        """Forget the queries, so that tasks can be measured at new weights; the influence measured so far is kept.

        Parameters
        ----------
        keep : float
            By what to multiply the weight of everything measured so far, from 0 to 1: exp(-age / time constant) at each
            of several rounds makes an exponential average of them.

        Raises
        ------
        ValueError
            If ``keep`` is out of range.
        """
        self._require_idle()
        if not 0 <= keep <= 1:
            raise ValueError(f"keep must lie between 0 and 1; got {keep!r}")
        self._tell_ranks()
        self._closed_projection_variance = self._projection_variance() * keep**2 if keep else np.zeros(self._shape)
        self._projected, self._loaded_projection_variance = {}, None
        self._refreshes += 1
        self._estimator.forget(keep)
        self._begin_tasks()

    def reset(self) -> None:
        """Forget everything that was measured."""
        self._require_idle()
        self._estimator.reset()
        self._begin_projections()
        self.dropped = self._dropped_in_row = 0
        self._begin_tasks()

    def state_dict(self, *, within_round: bool = False) -> dict[str, Any]:
        """Return what was measured as plain JSON types, without the queries: a resumed run measures its tasks anew.

        With several ranks it is the same on all of them, and may be loaded by any number of ranks.

        Parameters
        ----------
        within_round : bool
            False: the resumed run may measure its tasks on any batches, at any weights. True: it measures them at the
            same weights on the same batches in the same order, and goes on to the same matrix, bit for bit, as if it
            had not been interrupted (where torch computes the same bits again). Influence that is projected adds
            tensors, under "projected".
        """
        dropped = self._tell_ranks()
        open_round = self._estimator.in_round
        going_on = open_round and within_round
        variance = self._closed_projection_variance if going_on else self._projection_variance()
        return {
            **self._identity(),
            "dropped": dropped,
            "captured": sorted(self._captured),
            "estimator": self._estimator.state_dict(within_round=within_round),
            "refreshes": self._refreshes + (open_round and not going_on),
            "projection_variance": variance.tolist(),
            **(
                {"projected": dict(self._projected), "projection_variance_so_far": self._projection_variance().tolist()}
                if going_on and self._projected
                else {}
            ),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; queries must be measured anew.

        Raises
        ------
        ValueError
            If the state is of another kind or version, or of other tasks, domains or preconditioner; nothing changes
            then.
        """
        self._require_idle()
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(f"state {name!r} must be {value!r}; got {state.get(name)!r}")
        dropped, captured = state.get("dropped"), state.get("captured")
        if not isinstance(dropped, int):
            raise ValueError(f"state 'dropped' must be an int; got {dropped!r}")
        if not isinstance(captured, list) or not all(isinstance(name, str) for name in captured):
            raise ValueError(f"state 'captured' must be a list of names; got {captured!r}")
        refreshes = state.get("refreshes", 0)
        if not isinstance(refreshes, int) or refreshes < 0:
            raise ValueError(f"state 'refreshes' must be an int of at least 0; got {refreshes!r}")
        variance = np.array(state.get("projection_variance", np.zeros(self._shape)), dtype=np.float64)
        if variance.shape != self._shape:
            raise ValueError(f"state 'projection_variance' must have shape {self._shape}; got {variance.shape}")
        so_far = state.get("projection_variance_so_far")
        so_far = None if so_far is None else np.array(so_far, dtype=np.float64)
        if so_far is not None and so_far.shape != self._shape:
            raise ValueError(f"state 'projection_variance_so_far' must have shape {self._shape}; got {so_far.shape}")
        projected, parameters = state.get("projected", {}), self.parameters()
        if not set(projected) <= set(parameters) or not all(isinstance(each, Tensor) for each in projected.values()):
            raise ValueError(f"state 'projected' must hold tensors of this model's parameters; got {list(projected)}")
        self._estimator.load_state_dict(state.get("estimator", {}))
        self._begin_projections()
        self._refreshes, self._closed_projection_variance = refreshes, variance
        self._projected = {name: each.to(parameters[name].device, copy=True) for name, each in projected.items()}
        self._loaded_projection_variance = so_far
        # Those that all ranks dropped together are counted by the first from here on.
        self.dropped = dropped if self._ranks is None or self._ranks.index == 0 else 0
        self._captured = set(captured)
        self._begin_tasks()

    def _identity(self) -> dict[str, Any]:
        """Return what a state must share with this engine."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "tasks": list(self.task_names),
            "domains": list(self.domain_names),
            "preconditioner": self.preconditioner.name,
            "excluded": self._excluded(),
            "projection": self._projection_settings(),
        }

    @property
    def _shape(self) -> tuple[int, int]:
        return len(self.task_names), len(self.domain_names)

    def _projection_settings(self) -> dict[str, Any] | None:
        return None if self.projection is None else asdict(self.projection)

    def _begin_projections(self) -> None:
        # Of the rounds that are closed the variance is kept; that of the open one follows from its gradients.
        self._refreshes = 0
        self._closed_projection_variance = np.zeros(self._shape)
        self._projected = {}
        # Of a round that was loaded it is told by the state, until its queries are measured again.
        self._loaded_projection_variance = None

    def _projection_variance(self) -> NDArray[np.float64]:
        """Return what projecting added to the variance of the sums [n, m] over all micro-batches."""
        closed = self._closed_projection_variance.copy()
        if self.projection is None or not self._projected:
            return closed
        if self._queries is None:
            so_far = self._loaded_projection_variance
            return closed * np.nan if so_far is None else so_far.copy()  # earlier states do not tell
        queries = self._queries.by_task(len(self.task_names), self._projected)
        of_layers = [
            ops.projection_stderr(gradients, queries[name]).square().cpu().numpy()
            for name, gradients in self._projected.items()
        ]
        return self.projection.total_variance(closed, np.sum(of_layers, axis=0))

    def _tell_ranks(self) -> int:
        """Share what the ranks measured since they last did, and return how many micro-batches they dropped."""
        if self._ranks is None:
            return self.dropped
        if self._queries is not None:
            self._pending.tell(self._ranks, self._estimator, self._queries, self._projected)
        return int(self._ranks.total(np.array([self.dropped]))[0])

    def _round_so_far(self) -> tuple[Queries | None, NDArray[np.float64], NDArray[np.float64]]:
        """Return the queries of the open round, and tokens times influence [n, m] and the target tokens [m] of it."""
        self._tell_ranks()
        return self._queries, *self._estimator.open_round()

    def _begin_tasks(self) -> None:
        self._tasks = TaskGradients(self.task_names, self.task_splits, self._copiers, self._ranks, self.share_queries)
        self._pending = PendingMicrobatches()
        self._queries = None
        self._weights = None

    def _choose_copiers(self) -> dict[torch.device, Copier]:
        """Decide for every device whether task gradients and queries rest there or in host memory."""
        chosen: dict[torch.device, Copier] = {}
        for device in {p.device for p in self.parameters().values()}:
            if self.queries_device is None or (self.queries_device == "auto" and self._fit(device)):
                continue
            copier = offload.copier_for(device)
            if copier is not None:
                chosen[device] = copier
        return chosen

    def _fit(self, device: torch.device) -> bool:
        memory = offload.free_memory(device)
        if memory is None:
            return True
        free, total = memory
        cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        estimate = self.memory_estimate(cast, device=device, queries_device="auto")
        # Activations of a first step are not known yet, and memory is cut up with time.
        fits = estimate.peak <= free - total // 20
        _LOG.info(
            "queries rest %s: they take %s at the peak on %s, of whose %s %s are free",
            "there" if fits else "in host memory",
            *(readable_size(estimate.peak), device, readable_size(total), readable_size(free)),
        )
        return fits

    def _labels(self, ids: Ids, mask: Tensor | int | None) -> RowLabels:
        length = mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if isinstance(ids, str) or (isinstance(ids, int) and not isinstance(ids, bool)):
            return RowLabels(self._domain(ids), len(self.domain_names), self.batch_dim, length)
        if isinstance(ids, np.ndarray):
            ids = torch.as_tensor(ids)
        if isinstance(ids, Sequence):
            ids = torch.tensor([self._domain(each) for each in ids], dtype=torch.int64, device="cpu")
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"ids must be a domain's name or index, or an int tensor [B] or [B, S]; got {got}")
        ids = ids.cpu()
        if ids.ndim not in (1, 2) or not ids.numel():
            raise ValueError(f"ids must have shape [B] or [B, S] and not be empty; got {list(ids.shape)}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= len(self.domain_names):
            raise ValueError(f"ids must lie in 0 ... {len(self.domain_names) - 1}; got values from {low} to {high}")
        return RowLabels(ids, len(self.domain_names), self.batch_dim, length)

    def _domain(self, given: str | int) -> int:
        if isinstance(given, str):
            return self._index_of("domain", given, self.domain_names)
        if not 0 <= given < len(self.domain_names):
            raise ValueError(f"ids must lie in 0 ... {len(self.domain_names) - 1}; got {given}")
        return int(given)

    @staticmethod
    def _index_of(kind: str, name: str, names: tuple[str, ...]) -> int:
        if name not in names:
            raise ValueError(f"unknown {kind} {name!r}; the {kind}s are {', '.join(names)}")
        return names.index(name)

    def _trainable(self) -> Iterator[tuple[str, Tensor]]:
        model = self.model
        reshard(model)
        # The names are those of the innermost model, whatever wraps it now.
        while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
            model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model._orig_mod  # type: ignore[assignment]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                yield canonical_name(name), parameter

    def _excluded(self) -> list[str]:
        return [name for name, _ in self._trainable() if self._is_excluded(name)]

    def _is_excluded(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def _require_idle(self) -> None:
        if self._open:
            raise RuntimeError("another context of this engine is open: leave it first")

    def _enter(self, stack: ExitStack) -> None:
        def leave() -> None:
            self._open = False

        self._open = True
        stack.callback(leave)

    def _check_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        check_sharding(self.model, parameters)
        for name, parameter in parameters.items():
            if getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise RuntimeError(
                    f"{name!r} has a post-accumulate-grad hook: an optimizer that steps inside the backward is not "
                    "supported; remove the hook while measuring"
                )

    def _stale_flags(self, weights: Weights, since: str) -> list[Tensor]:
        """Raise if weights changed as far as that is told without waiting; return what is still to be read."""
        if self._weights is None:
            return []
        self._check_stale([self._weights.moved(weights)], since)
        flags = weights.differences(self._weights)
        if not weights.on_host:
            return flags
        self._check_stale(flags, since)
        return []

    @staticmethod
    def _check_stale(flags: Sequence[Tensor | bool], since: str) -> None:
        if any(map(bool, flags)):
            raise RuntimeError(
                f"weights changed since {since}: task and domain gradients must belong to the same weights. Call "
                "engine.refresh() and measure the tasks again after every optimizer step; in-run, call run.step() "
                "after it (or allow_stale=True for domains, at your own risk)"
            )

    @staticmethod
    def _check_stepping(flags: Sequence[Tensor], context: str) -> None:
        if any(map(bool, flags)):
            raise RuntimeError(
                f"weights changed inside {context}(...): step the optimizer outside; one that steps inside the "
                "backward is not supported"
            )

    @staticmethod
    def _check_captured(touched: Sequence[str], recorder: Recorder) -> None:
        if not touched:
            raise RuntimeError("no gradient reached a parameter inside domains(...): run loss.backward() in it")
        missed = [name for name in touched if name not in recorder.sums]
        if missed:
            raise _not_captured(missed)

    def _drop_if_not_finite(self, finite: bool, what: str, scaler: Any) -> bool:
        if finite:
            self._dropped_in_row = 0
            return False
        raise_on_device_errors()
        if scaler is None:
            raise FloatingPointError(f"{what} gave gradients that are not finite; nothing of it was kept")
        self.dropped += 1
        self._dropped_in_row += 1
        if self._dropped_in_row >= self.max_dropped_in_row:
            raise FloatingPointError(
                f"{what} gave gradients that are not finite, {self._dropped_in_row} times in a row: the scaler does "
                "not recover"
            )
        return True


_HALF = (torch.bfloat16, torch.float16)


def _not_captured(missed: Sequence[str]) -> UncapturedParameterError:
    return UncapturedParameterError(
        f"gradients reached {', '.join(map(repr, missed))} in a way that was not captured (a fused kernel, a recurrent "
        "layer, a reference kept outside the module, or a unit of fully_shard used aside from its forward). Leave "
        f"them out with exclude={list(missed)!r}, and their influence counts as zero"
    )


def _sum(gradient: Tensor) -> Tensor:
    values = _values(gradient)
    return values.sum(dtype=torch.promote_types(values.dtype, torch.float32))


def _all_finite(sums: Sequence[Tensor], gradients: Collection[Tensor]) -> bool:
    # A sum of numbers one of which is not finite is not finite; adding is faster than asking each.
    return all(map(math.isfinite, sums)) or all(bool(torch.isfinite(_values(each)).all()) for each in gradients)


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _unread(
    stale: list[Tensor],
    before: Weights,
    parameters: Mapping[str, Tensor],
    labels: RowLabels,
    mask: Tensor | int | None,
    seen: SeenLosses,
    scale: LossScale,
) -> dict[str, list[Tensor]]:
    """Return what both contexts have to read when they end."""
    now = Weights(parameters)
    return {
        "stale": stale,
        "stepped": [torch.tensor(True, device="cpu")] if now.moved(before) else now.differences(before),
        "masked": masked_targets(labels, mask),
        "losses": seen.summaries(),
        "scale": [scale.unread],
    }


def _names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names) or not len(names):
        raise ValueError(f"{argument} must be a sequence of non-empty names; got {names!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"{argument} must be unique; got {list(names)!r}")
    return tuple(names)


def _require_choice(argument: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def _require_count(argument: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{argument} must be an int of at least {least}; got {value!r}")
