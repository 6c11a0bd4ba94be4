"""The state of an engine while it measures, and the contexts that change it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tikmix_fast.influence.capture.rows import RowLabels
from tikmix_fast.influence.loss.loss_account import LossAccount
from tikmix_fast.influence.options import EngineOptions
from tikmix_fast.influence.parallel.fully_sharded import is_sharded
from tikmix_fast.influence.parallel.ranks import Ranks
from tikmix_fast.influence.passes.conservation import check_conservation
from tikmix_fast.influence.passes.coverage import Coverage
from tikmix_fast.influence.passes.covered_parameters import CoveredParameters
from tikmix_fast.influence.passes.domain_ids import Ids, index_of, label_rows
from tikmix_fast.influence.passes.dropped_passes import DroppedPasses
from tikmix_fast.influence.passes.fingerprint import Fingerprint
from tikmix_fast.influence.passes.influence_sink import InfluenceSink
from tikmix_fast.influence.passes.measured_pass import MeasuredPass, all_finite, check_captured, not_captured, sum_of
from tikmix_fast.influence.passes.verify import Verification, verify_cells
from tikmix_fast.influence.preconditioners.adam import Adam
from tikmix_fast.influence.preconditioners.ekfac import EKFAC
from tikmix_fast.influence.preconditioners.protocol import Preconditioner
from tikmix_fast.influence.queries.projected_sums import ProjectedSums
from tikmix_fast.influence.queries.query_sketch import QuerySketch, Watched
from tikmix_fast.influence.queries.rank_exchange import PendingMicrobatches
from tikmix_fast.influence.queries.store import Queries
from tikmix_fast.influence.queries.task_gradients import TaskGradients
from tikmix_fast.influence.query_placement import Placement
from tikmix_fast.matrix.estimator import Estimator
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.ops.common.device_checks import raise_on_device_errors

__all__ = ["Phase", "Session"]

_LOG = logging.getLogger("tikmix_fast")
_FORMAT = "tikmix_fast.influence_engine"
_VERSION = 1
_HALF = (torch.bfloat16, torch.float16)


class Phase(Enum):
    """The phases of a round: first it sums task gradients, then it measures domains with frozen queries."""

    TASKS = "tasks"
    FROZEN = "frozen"


class Session:
    """Sum task gradients, freeze them as queries, add up micro-batches of domains, and start over with `refresh`.

    Parameters
    ----------
    model : nn.Module
    options : EngineOptions
    preconditioner : Preconditioner
    optimizer : object
        The optimizer or state dict that the preconditioner reads.
    covered : CoveredParameters
    ranks : Ranks or None
        The processes that measure together.

    Attributes
    ----------
    phase : Phase
    placement : Placement
    sketch : QuerySketch or None
        Gets the queries when they freeze.
    """

    def __init__(
        self,
        model: nn.Module,
        options: EngineOptions,
        preconditioner: Preconditioner,
        optimizer: Any,
        covered: CoveredParameters,
        ranks: Ranks | None,
    ) -> None:
        self.model, self.options, self.covered = model, options, covered
        self.preconditioner, self.optimizer = preconditioner, optimizer
        self._ranks = ranks
        self._shares = options.share_queries and ranks is not None
        self.placement = Placement(
            model,
            options,
            covered,
            adam=isinstance(preconditioner, Adam),
            shares=ranks.size if self._shares and ranks is not None else 1,
        )
        self._busy = False
        self.sketch: QuerySketch | None = None
        self._begin()

    def _begin(self) -> None:
        """Start with nothing measured."""
        self._estimator = Estimator(*self.options.shape)
        self._projected = ProjectedSums(self.options.projection, *self.options.shape)
        self._captured: set[str] = set()
        self._passes = 0
        self._dropped = DroppedPasses(self.options.max_dropped_in_row)
        self._begin_tasks()

    def _begin_tasks(self) -> None:
        self.phase = Phase.TASKS
        self._tasks = TaskGradients(
            self.options.tasks, self.options.task_splits, self.placement.copiers, self._ranks, self._shares
        )
        self._pending = PendingMicrobatches()
        self._queries: Queries | None = None
        self._weights: Fingerprint | None = None  # at which the tasks were measured

    @property
    def queries(self) -> Queries | None:
        """The frozen queries; None in the phase of tasks."""
        return self._queries

    @property
    def dropped(self) -> int:
        """The number of this process's passes that were dropped because they were not finite."""
        return self._dropped.count

    @contextmanager
    def task(self, name: str, mask: Tensor | int | None, normalizer: float | None, scaler: Any) -> Iterator[None]:
        """See `InfluenceEngine.task`."""
        options = self.options
        index = index_of("task", name, options.tasks)
        self._require_tasks("new tasks")
        account = LossAccount(RowLabels(0, 1, options.batch_dim), mask, normalizer, scaler, options.reduction)
        parameters = self.covered.begin_pass()
        measured = MeasuredPass(
            self.model, parameters, account, context="task", frozen=self._weights, since="the first task"
        )
        if self.placement.decide({parameter.device for parameter in parameters.values()}):
            self._begin_tasks()
        with self._occupied(), measured.open(None, fused=False, take=True, keep=True) as pass_gradients:
            yield
            gradients = pass_gradients.taken()
            if pass_gradients.unseen():
                raise not_captured(pass_gradients.unseen())
            if not gradients:
                raise RuntimeError(f"no gradient reached a parameter inside task({name!r}): run loss.backward() in it")
            readings, rows = measured.read(gradients.values(), sums=[sum_of(each) for each in gradients.values()])
            account.settle(readings, rows)
            finite = self._tasks.all_usable(index, all_finite(readings["sums"], gradients.values()))
            if self._dropped.drops(finite, f"task {name!r}", scaler):
                return
            account.check()
            self._tasks.add(index, gradients, float(account.tokens[0]), account.factor, parameters)
            self._weights = measured.weights

    @contextmanager
    def domains(self, ids: Ids, mask: Tensor | int | None, normalizer: float | None, scaler: Any) -> Iterator[None]:
        """See `InfluenceEngine.domains`."""
        self._require_idle()
        options = self.options
        labels = label_rows(ids, mask, options.domains, options.batch_dim)
        account = LossAccount(labels, mask, normalizer, scaler, options.reduction)
        parameters = self.covered.begin_pass()
        measured = MeasuredPass(
            self.model,
            parameters,
            account,
            context="domains",
            frozen=None if options.allow_stale else self._weights,
            since="the tasks were measured",
        )
        queries = self._freeze(parameters)
        checking = options.check_every > 0 and self._passes % options.check_every == 0
        sink = InfluenceSink(labels, queries.store, queries.projections)
        passing = measured.open(sink, fused=options.grad == "fused", take=False, keep=checking)
        with self._occupied(), passing as gradients:
            queries.store.begin_pass()
            yield
        # The host has not waited for the device so far. Now one copy brings everything that it must know.
        total = sink.total()
        readings, rows = measured.read(products=[] if total is None else [total])
        check_captured(gradients.touched(), sink.sums)
        account.settle(readings, rows)
        products = readings["products"][0].numpy() * account.factor
        if self._dropped.drops(bool(np.isfinite(products).all()), "a micro-batch of domains", scaler):
            return
        account.check()
        if checking:
            low = sink.saw_half or any(p.dtype in _HALF for p in parameters.values())
            before, after = gradients.change()
            tolerance = 2e-2 if low else 1e-3
            check_conservation(sink.sums, queries.store, before, after, tolerance, queries.projections)
        self._add(products, account, sink)

    @contextmanager
    def fisher(self, stage: Any, sequences: int | None, tokens: int | None) -> Iterator[None]:
        """See `InfluenceEngine.fisher`."""
        self._require_idle()
        if self._ranks is not None or any(map(is_sharded, self.covered.parameters().values())):
            raise RuntimeError(
                "fisher(...) fits on one process: fit with process_group=None, save the preconditioner, and make every "
                "rank's engine with preconditioner=EKFAC.load(path) or DiagonalFisher.load(path)"
            )
        if not isinstance(self.preconditioner, EKFAC):
            raise RuntimeError(
                "fisher(...) fits preconditioner='ekfac' or 'diagonal_fisher'; this engine's is "
                f"{self.preconditioner.name!r}"
            )
        self._require_tasks("fisher")
        parameters = self.covered.begin_pass()
        fit = self.preconditioner.observe(
            self.model, parameters, stage, sequences=sequences, tokens=tokens, batch_dim=self.options.batch_dim
        )
        with self._occupied(), fit:
            yield

    def verify(
        self, loss_per_row: Callable[[nn.Module, Any], Tensor], batch: Any, ids: Ids, cells: int, seed: int
    ) -> Verification:
        """See `InfluenceEngine.verify`."""
        self._require_idle()
        if self._queries is None:
            raise RuntimeError("verify needs frozen queries: run task(...) for every task and one domains(...) first")
        options = self.options
        return verify_cells(
            self.model,
            self.covered.begin_pass(),
            self._queries,
            label_rows(ids, None, options.domains, options.batch_dim),
            loss_per_row,
            batch,
            names=(options.tasks, options.domains),
            fused=options.grad == "fused",
            cells=cells,
            seed=seed,
        )

    def matrix(self) -> InfluenceMatrix:
        """See `InfluenceEngine.matrix`."""
        raise_on_device_errors()
        dropped = self.exchange()
        options = self.options
        settings = {
            "preconditioner": self.preconditioner.name,
            "task_splits": options.task_splits,
            "excluded": self.covered.excluded(),
            "reference_lr": getattr(self.preconditioner, "reference_lr", None),
            "projection": options.projection_settings,
        }
        variance = None if options.projection is None else self._projected.variance(self._queries)
        return self._estimator.matrix(options.tasks, options.domains, dropped, settings, variance)

    def coverage(self) -> Coverage:
        """See `InfluenceEngine.coverage`."""
        return self.covered.coverage(self._captured)

    def refresh(self, keep: float) -> None:
        """See `InfluenceEngine.refresh`."""
        self._require_idle()
        if not 0 <= keep <= 1:
            raise ValueError(f"keep must lie between 0 and 1; got {keep!r}")
        self.exchange()
        self._projected.close_round(self._queries, keep)
        self._estimator.forget(keep)
        self._begin_tasks()

    def reset(self) -> None:
        """See `InfluenceEngine.reset`."""
        self._require_idle()
        self._begin()

    def state_dict(self, *, within_round: bool) -> dict[str, Any]:
        """See `InfluenceEngine.state_dict`."""
        dropped = self.exchange()
        in_round = self._estimator.in_round
        return {
            **self._identity(),
            "dropped": dropped,
            "captured": sorted(self._captured),
            "estimator": self._estimator.state_dict(within_round=within_round),
            **self._projected.state_dict(self._queries, in_round=in_round, within_round=within_round),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `InfluenceEngine.load_state_dict`."""
        self._require_idle()
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(f"state {name!r} must be {value!r}; got {state.get(name)!r}")
        dropped, captured = state.get("dropped"), state.get("captured")
        if not isinstance(dropped, int):
            raise ValueError(f"state 'dropped' must be an int; got {dropped!r}")
        if not isinstance(captured, list) or not all(isinstance(name, str) for name in captured):
            raise ValueError(f"state 'captured' must be a list of names; got {captured!r}")
        projected = self._projected.read_state(state, self.covered.parameters())
        self._estimator.load_state_dict(state.get("estimator", {}))
        self._projected, self._captured = projected, set(captured)
        # The count is the sum over all ranks, so only the first rank takes it over.
        self._dropped.count = dropped if self._ranks is None or self._ranks.index == 0 else 0
        self._begin_tasks()

    def exchange(self) -> int:
        """Exchange the ranks' new micro-batches, and return how many passes all ranks dropped."""
        if self._ranks is None:
            return self.dropped
        if self._queries is not None:
            self._pending.exchange(self._ranks, self._estimator, self._queries, self._projected)
        return int(self._ranks.total(np.array([self.dropped]))[0])

    def open_round(self) -> tuple[Queries | None, NDArray[np.float64], NDArray[np.float64]]:
        """Return the round's queries, tokens times influence [n, m], and target tokens [m] so far."""
        self.exchange()
        return self._queries, *self._estimator.open_round()

    def fewest_splits(self) -> int:
        """Return how many splits have a batch, for the task with the fewest; all ranks must call this."""
        return self._tasks.fewest_splits()

    def _identity(self) -> dict[str, Any]:
        """Return the part of a state that must equal this engine's."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "tasks": list(self.options.tasks),
            "domains": list(self.options.domains),
            "preconditioner": self.preconditioner.name,
            "excluded": self.covered.excluded(),
            "projection": self.options.projection_settings,
        }

    def _freeze(self, parameters: Mapping[str, Tensor]) -> Queries:
        if self._queries is not None:
            return self._queries
        projection = self.options.projection
        projections = projection.layers(self.model, parameters, self._projected.rounds) if projection else {}
        preconditioner = self.preconditioner if self.sketch is None else Watched(self.preconditioner, self.sketch)
        queries = self._tasks.freeze(parameters, preconditioner, self.optimizer, projections)
        self._estimator.begin_round(queries.owners, queries.weights)
        self._queries, self.phase = queries, Phase.FROZEN
        return queries

    def _add(self, products: NDArray[np.float64], account: LossAccount, sink: InfluenceSink) -> None:
        projected = {name: gradients.mul_(account.factor) for name, gradients in sink.projected.items()}
        if self._ranks is None:
            self._estimator.add(products, account.tokens)
            self._projected.add(projected)
        else:
            self._pending.add(products, account.tokens, projected)
        self._captured |= set(sink.sums)
        self._passes += 1
        if self._passes == 1:
            coverage = self.coverage()
            _LOG.log(logging.INFO if coverage.share == 1 else logging.WARNING, "%s", coverage)

    @contextmanager
    def _occupied(self) -> Iterator[None]:
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _require_idle(self) -> None:
        if self._busy:
            raise RuntimeError("another context of this engine is open: leave it first")

    def _require_tasks(self, purpose: str) -> None:
        self._require_idle()
        if self.phase is Phase.FROZEN:
            raise RuntimeError(
                f"the queries are frozen since the first domains(...): call engine.refresh() before {purpose}"
            )
