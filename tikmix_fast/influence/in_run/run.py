"""Influence from a training run's own batches, at some of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from tikmix_fast.arguments import require_int
from tikmix_fast.influence.in_run.staleness import Staleness, StalenessHistory
from tikmix_fast.influence.passes.domain_ids import Ids
from tikmix_fast.influence.queries.query_sketch import QuerySketch
from tikmix_fast.influence.session import Phase, Session
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix

__all__ = ["InRun"]

_FORMAT = "tikmix_fast.in_run"
_VERSION = 1
_NEAR_LAGS = (1, 2, 4)


class InRun:
    """Measure influence in a training run: wrap every micro-batch, and call `step` after every optimizer step.

    A measured step first runs small task passes at its own weights. Then it measures the domains on its ordinary
    micro-batches. Other steps run as if this object did not exist. S is the average over measured steps with weights
    exp(-age / time constant), age in optimizer steps. `InfluenceEngine.in_run` makes this object; the engine must
    measure nothing else while it is in use.

    Parameters
    ----------
    session : Session
        The engine's session.
    every : int
        Optimizer steps from one measured step to the next; the first one is step ``every - 1``, counted from 0.
    tasks : callable (step) -> None
        Runs the task passes of a measured step: forward and backward inside ``engine.task(name)``, for every task, on
        at least ``task_splits`` batches that were not used lately. It gets the step, so that a resumed run can draw the
        same batches.
    time_constant : float
        In optimizer steps, above 0; infinite: all measured steps have the same weight.
    near_every : int
        After every ``near_every`` measured steps, measure another step 1, 2 or 4 steps later (in turn), so that
        `staleness` includes short lags. This step counts for S like any other. Task passes then cost 1 + 1 / near_every
        times as much. 0: never.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from tikmix_fast import InfluenceEngine
    >>> model = nn.Linear(4, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> engine = InfluenceEngine(model, ["web", "code"], ["qa"], preconditioner="identity")
    >>> def measure_tasks(step):
    ...     for _ in range(2):
    ...         with engine.task("qa"):
    ...             model(torch.ones(8, 4)).mean().backward()
    >>> run = engine.in_run(every=2, tasks=measure_tasks, time_constant=100)
    >>> for _ in range(4):
    ...     for _ in range(2):  # gradient accumulation
    ...         with run.micro_batch([0, 1, 1], normalizer=6):
    ...             (model(torch.ones(3, 4)).mean() / 2).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     run.step()
    >>> run.measured, run.matrix().values.round(3)
    (2, array([[5., 5.]]))
    """

    def __init__(
        self,
        session: Session,
        every: int,
        tasks: Callable[[int], object],
        time_constant: float = math.inf,
        near_every: int = 0,
    ) -> None:
        require_int("every", every, 1)
        require_int("near_every", near_every, 0)
        if not callable(tasks):
            raise TypeError(f"tasks must be callable with the step; got {type(tasks).__name__}")
        if not time_constant > 0:
            raise ValueError(f"time_constant must be above 0, in optimizer steps; got {time_constant!r}")
        self._session, self.every, self.tasks = session, every, tasks
        self.time_constant, self.near_every = float(time_constant), near_every
        self.steps = self.measured = self.skipped = 0
        self._near_lags = tuple(lag for lag in _NEAR_LAGS if lag < every) if near_every else ()
        self._due = every - 1
        self._regular: int | None = None  # the next regular step, while a near one is due before it
        self._weighed: int | None = None  # the step at which the weights of earlier steps last decayed
        self._history = StalenessHistory(len(session.options.tasks))
        self._sketch: QuerySketch | None = None  # of the current step, if it is measured

    @property
    def measuring(self) -> bool:
        """Whether the current step is a measured one."""
        return self.steps >= self._due

    @contextmanager
    def micro_batch(
        self, ids: Ids, mask: Tensor | int | None = None, normalizer: float | None = None, *, scaler: Any = None
    ) -> Iterator[None]:
        """Run forward and backward of one training micro-batch inside; arguments and errors as `engine.domains`.

        The first micro-batch of a measured step runs the task passes before it starts. Steps that are not measured
        cost nothing. With gradient accumulation, ``normalizer`` is the total divisor of the sum of token losses. If the
        loss is a mean divided by the number of micro-batches, that is the micro-batch's target tokens times this
        number.
        """
        if self.measuring and self._sketch is None:
            self._measure_tasks()
        if self._sketch is None:
            yield
            return
        try:
            with self._session.domains(ids, mask, normalizer, scaler):
                yield
        finally:
            # It failed before the queries froze: the next try measures the tasks again.
            if self._session.phase is Phase.TASKS:
                self._end_measuring()

    def step(self) -> None:
        """Close the step; call it after the optimizer has stepped."""
        if self._sketch is not None:
            queries, sums, tokens = self._session.open_round()
            if queries is not None and tokens.any():
                sketch = self._sketch.by_task(len(self._session.options.tasks), queries.owners, queries.weights)
                self._history.add(self.steps, *sketch, sums, tokens)
                self._schedule()
                self.measured += 1
            # The weights have changed: free the queries, which are large and no longer valid.
            self._session.refresh(keep=1.0)
            self._end_measuring()
        self.steps += 1

    def matrix(self) -> InfluenceMatrix:
        """Return the influence averaged over the measured steps; ``tokens`` are weighted as in the average.

        Standard errors assume independent measured steps, and a constant S within a time constant. `staleness` reports
        how far S moved.
        """
        options = {"every": self.every, "near_every": self.near_every}
        progress = {"steps": self.steps, "measured": self.measured}
        matrix = self._session.matrix()
        in_run = {**options, "time_constant": self._finite_time_constant, **progress}
        return replace(matrix, settings={**matrix.settings, "in_run": in_run})

    def staleness(self) -> Staleness:
        """Report how fast queries and S went stale so far, and suggest a time constant; you can print it."""
        return self._history.report(self.every)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON types, between two steps; a run that loads it continues as if uninterrupted.

        Raises
        ------
        RuntimeError
            Inside a measured step.
        """
        if self._sketch is not None:
            raise RuntimeError("a measured step is under way: save after run.step()")
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "every": self.every,
            "near_every": self.near_every,
            "time_constant": self._finite_time_constant,
            **{name: getattr(self, name) for name in ("steps", "measured", "skipped")},
            **{name: getattr(self, f"_{name}") for name in ("due", "regular", "weighed")},
            "staleness": self._history.to_dict(),
            "engine": self._session.state_dict(within_round=False),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`, which includes the engine's state.

        Raises
        ------
        ValueError
            If kind, version or schedule differ, or the state does not fit the engine; nothing changes then.
        """
        own = {
            "format": _FORMAT,
            "version": _VERSION,
            "every": self.every,
            "near_every": self.near_every,
            "time_constant": self._finite_time_constant,
        }
        for name, value in own.items():
            if state.get(name) != value:
                raise ValueError(f"state {name!r} must be {value!r}; got {state.get(name)!r}")
        counts: dict[str, Any] = {}
        for name in ("steps", "measured", "skipped", "due", "regular", "weighed"):
            counts[name] = state.get(name)
            optional = name in ("regular", "weighed") and counts[name] is None
            if not optional and (not isinstance(counts[name], int) or counts[name] < 0):
                raise ValueError(f"state {name!r} must be an int of at least 0; got {counts[name]!r}")
        history = StalenessHistory.from_dict(state.get("staleness"), len(self._session.options.tasks))
        self._session.load_state_dict(state.get("engine", {}))
        self.steps, self.measured, self.skipped = counts["steps"], counts["measured"], counts["skipped"]
        self._due, self._regular, self._weighed = counts["due"], counts["regular"], counts["weighed"]
        self._history = history
        self._end_measuring()

    @property
    def _finite_time_constant(self) -> float | None:
        """The time constant in JSON: None for infinity."""
        return None if math.isinf(self.time_constant) else self.time_constant

    def _measure_tasks(self) -> None:
        age = 0 if self._weighed is None else self.steps - self._weighed
        self._session.refresh(keep=math.exp(-age / self.time_constant))
        self._weighed = self.steps
        dropped = self._session.exchange()
        self.tasks(self.steps)
        fewest = min(2, self._session.options.task_splits)
        if self._session.fewest_splits() < fewest and self._session.exchange() > dropped:
            # A GradScaler is still adapting its scale, and dropped batches that a task (or its error bars) needs. All
            # ranks try again at the next step.
            self.skipped += 1
            self._due = self.steps + 1
            return
        self._sketch = self._session.sketch = QuerySketch()

    def _end_measuring(self) -> None:
        self._sketch = self._session.sketch = None

    def _schedule(self) -> None:
        if self._regular is not None:
            self._due, self._regular = max(self._regular, self.steps + 1), None
            return
        self._due = self.steps + self.every
        # `measured` does not count this step yet; it includes near steps.
        period = self.near_every + 1
        if self._near_lags and self.measured % period == self.near_every - 1:
            lag = self._near_lags[self.measured // period % len(self._near_lags)]
            self._due, self._regular = self.steps + lag, self._due
