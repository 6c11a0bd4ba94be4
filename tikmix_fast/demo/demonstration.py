"""The demonstration: one model trained on a mixture that follows Group Influence, and its twin on a uniform one."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from tikmix_fast.demo.arm import Arm
from tikmix_fast.demo.corpora import Corpora, Sequences
from tikmix_fast.demo.gpt import GPT
from tikmix_fast.demo.measuring import measure, rows_measured
from tikmix_fast.demo.results import ArmResult, Boundary, DemoResult
from tikmix_fast.demo.settings import DemoSettings
from tikmix_fast.demo.state import DemoState
from tikmix_fast.mixture.direct.tikmix_d import tikmix_d
from tikmix_fast.tensor_files import digest

__all__ = ["Progress", "demonstrate", "task_losses", "work"]

Progress = Callable[[str, float], None]
"""Called with the name of the current stage and the share of `work` done since the last call."""

_EVALUATION_COST = 1 / 3
"""Cost of evaluating one sequence, forward only, in units of training on one."""

_EVALUATION_ROWS = 32


def demonstrate(
    settings: DemoSettings,
    corpora: Corpora,
    progress: Progress = lambda what, amount: None,
    state: DemoState | None = None,
) -> DemoResult:
    """Train both arms of one seed.

    Both arms share the first stage, with a uniform mixture. At each later stage boundary the first arm measures the
    influence of every domain on the steered tasks, and continues with the mixture that TiKMiX-D makes of it. The
    second arm keeps the uniform mixture. Both arms see the same number of tokens.

    Parameters
    ----------
    settings : DemoSettings
    corpora : Corpora
    progress : callable, optional
    state : DemoState, optional
        Keeps the progress in a file. After a kill at any moment, a call with a state of the same file continues from
        the last save. It ends with the same parameters, losses and mixtures, bit for bit where torch reproduces its
        bits (same machine and number of threads).

    Raises
    ------
    FloatingPointError
        If a loss is not finite.
    """
    run = _Run(settings, corpora, progress, state)
    run.train_followed()
    run.train_uniform()
    return run.result()


class _Run:
    """One call of `demonstrate`: everything that its state file keeps."""

    def __init__(self, settings: DemoSettings, corpora: Corpora, progress: Progress, state: DemoState | None) -> None:
        length = settings.model.length
        self.settings, self.corpora, self.progress, self.state = settings, corpora, progress, state
        self.domains = {name: Sequences(text, length) for name, text in corpora.domains.items()}
        self.steered = {name: Sequences(corpora.tasks[name].measure, length) for name in corpora.steered}
        self.reported = {name: Sequences(task.report, length) for name, task in corpora.tasks.items()}
        self.measured_rows = rows_measured(settings, len(self.domains), len(self.steered))
        self.random = np.random.default_rng([settings.seed, 1])
        self.clock = _Clock()
        self.done = 0.0
        self.arms = {"tikmix": Arm(settings, self.domains)}
        self.results = {"tikmix": ArmResult(weights=[(0, self.arms["tikmix"].weights)]), "uniform": ArmResult()}
        self.boundaries: list[Boundary] = []
        if state is not None and state.progress is not None:
            self._continue(state, state.progress)

    def train_followed(self) -> None:
        """Train the first arm: measure and move the mixture at every boundary."""
        settings, arm, result = self.settings, self.arms["tikmix"], self.results["tikmix"]
        self._train("tikmix", settings.boundaries[0], "both arms")
        if "uniform" not in self.arms:
            self.arms["uniform"] = arm.branch()
            self.results["uniform"] = ArmResult(losses=list(result.losses), weights=list(result.weights))
        known = {boundary.step for boundary in self.boundaries}  # from before an interruption
        for start, end in zip(settings.boundaries, (*settings.boundaries[1:], settings.steps), strict=True):
            if start not in known:
                self._move(start)
                self._save()
            self._train("tikmix", end, "TiKMiX-D")
        self._finish("tikmix")

    def train_uniform(self) -> None:
        """Train the second arm, whose mixture stays uniform."""
        self._train("uniform", self.settings.steps, "uniform")
        self._finish("uniform")

    def result(self) -> DemoResult:
        corpora, settings = self.corpora, self.settings
        return DemoResult(
            settings=settings,
            tikmix=self.results["tikmix"],
            uniform=self.results["uniform"],
            boundaries=self.boundaries,
            steered=corpora.steered,
            held_out=corpora.held_out,
            sources=corpora.sources,
            text_bytes={name: len(text) for name, text in corpora.domains.items()},
            missing=corpora.missing,
            seconds=dict(self.clock.seconds),
            rows={
                "trained per arm": settings.steps * settings.batch,
                "measured": len(self.boundaries) * self.measured_rows,
            },
        )

    def _move(self, step: int) -> None:
        """Measure, and give the first arm the mixture that TiKMiX-D makes of the matrix."""
        settings, arm = self.settings, self.arms["tikmix"]
        with self.clock.measure("measuring"):
            matrix = measure(arm.model, arm.optimizer, self.domains, self.steered, settings, self.random)
        self._advance("TiKMiX-D", self.measured_rows)
        with self.clock.measure("solving"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the solution holds them
            solution = tikmix_d(
                matrix,
                arm.weights,
                uniformity=settings.uniformity,
                influence=settings.influence,
                diversity=settings.diversity,
                floor=settings.floor,
                smoothing=settings.smoothing,
            )
        arm.sampler.set_weights(solution.as_dict())
        message = "; ".join([solution.message, *solution.warnings])
        self.boundaries.append(Boundary(step, matrix, arm.weights, message, solution.success))
        self.results["tikmix"].weights.append((step, arm.weights))

    def _train(self, name: str, until: int, what: str) -> None:
        settings, arm, result = self.settings, self.arms[name], self.results[name]
        while arm.step < until:
            with self.clock.measure("training"):
                arm.train_step()
            self._advance(what, settings.batch)
            if arm.step in settings.evaluations:
                with self.clock.measure("evaluating"):
                    losses = task_losses(arm.model, self.reported, settings.curve_rows)
                result.losses.append((arm.step, losses))
                self._advance(what, _EVALUATION_COST * len(self.reported) * settings.curve_rows)
            if self.state is not None and arm.step % self.state.every == 0:
                self._save()
        result.drawn = arm.drawn

    def _finish(self, name: str) -> None:
        arm, result = self.arms[name], self.results[name]
        if not result.final:
            with self.clock.measure("evaluating"):
                result.final = task_losses(arm.model, self.reported)
            result.parameters = digest(dict(arm.model.named_parameters()))
            self._save()

    def _advance(self, what: str, amount: float) -> None:
        self.done += amount
        self.progress(what, amount)

    def _save(self) -> None:
        if self.state is not None:
            content = {
                "results": {name: result.to_dict() for name, result in self.results.items()},
                "boundaries": [boundary.to_dict() for boundary in self.boundaries],
                "random": self.random.bit_generator.state,
                "seconds": dict(self.clock.seconds),
                "done": self.done,
            }
            self.state.write(self.arms, content)

    def _continue(self, state: DemoState, saved: Mapping[str, Any]) -> None:
        state.restore("tikmix", self.arms["tikmix"])
        twin = Arm(self.settings, self.domains)
        if state.restore("uniform", twin):
            self.arms["uniform"] = twin
        self.results = {name: ArmResult.from_dict(result) for name, result in saved["results"].items()}
        self.boundaries = [Boundary.from_dict(boundary) for boundary in saved["boundaries"]]
        self.random.bit_generator.state = saved["random"]
        self.clock.seconds.update(saved["seconds"])
        self._advance("going on", saved["done"])


def work(settings: DemoSettings, corpora: Corpora) -> float:
    """Return the total that `demonstrate` reports to ``progress``: about its cost, in sequences trained on."""
    shared = settings.boundaries[0]
    evaluations = sum(1 if step <= shared else 2 for step in settings.evaluations)
    return (
        (2 * settings.steps - shared) * settings.batch
        + evaluations * len(corpora.tasks) * settings.curve_rows * _EVALUATION_COST
        + len(settings.boundaries) * rows_measured(settings, len(corpora.domains), len(corpora.steered))
    )


@torch.no_grad()
def task_losses(model: GPT, tasks: Mapping[str, Sequences], rows: int | None = None) -> dict[str, float]:
    """Return each task's mean cross-entropy in nats per byte, over all its text or ``rows`` sequences spread over it.

    Raises
    ------
    FloatingPointError
        If a loss is not finite.
    """
    losses = {}
    for name, text in tasks.items():
        chosen = text.all()
        if rows is not None and rows < len(chosen):
            chosen = chosen[torch.arange(rows) * len(chosen) // rows]
        total = sum(float(model.loss(part)) * len(part) for part in chosen.split(_EVALUATION_ROWS))
        losses[name] = total / len(chosen)
        if not np.isfinite(losses[name]):
            raise FloatingPointError(f"the loss of task {name!r} is {losses[name]}: lower the learning rate")
    return losses


class _Clock:
    """Add up wall time by kind of work."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start
