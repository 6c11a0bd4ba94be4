"""The demonstration: one model trained on a mixture that follows Group Influence, and its twin on a uniform one."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

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
"""Called with what is being done, and how much of `work` was done since the last call."""

_EVALUATION_COST = 1 / 3
"""Of one sequence, forward only, in sequences trained on."""

_EVALUATION_ROWS = 32


def demonstrate(
    settings: DemoSettings,
    corpora: Corpora,
    progress: Progress = lambda what, amount: None,
    state: DemoState | None = None,
) -> DemoResult:
    """Train both arms of one seed.

    The first stage is uniform, and shared. From then on the first arm measures the influence of every domain on the
    steered tasks at each stage boundary and goes on with the mixture that TiKMiX-D makes of it; the second arm goes on
    with the uniform one. Both see the same number of tokens.

    Parameters
    ----------
    settings : DemoSettings
    corpora : Corpora
    progress : callable, optional
    state : DemoState, optional
        Where to keep how far it is. Killed at any moment, and called again with a state of the same file, it goes on
        from there, and ends with the same parameters, losses and mixtures, bit for bit where torch computes the same
        bits again (the same machine and number of threads).

    Raises
    ------
    FloatingPointError
        If a loss is no longer finite.
    """
    length = settings.model.length
    domains = {name: Sequences(text, length) for name, text in corpora.domains.items()}
    steered = {name: Sequences(corpora.tasks[name].measure, length) for name in corpora.steered}
    reported = {name: Sequences(task.report, length) for name, task in corpora.tasks.items()}
    random = np.random.default_rng([settings.seed, 1])
    clock = _Clock()
    done = 0.0

    arm = Arm(settings, domains)
    followed, uniform = ArmResult(weights=[(0, arm.weights)]), ArmResult()
    boundaries: list[Boundary] = []
    arms = {"tikmix": arm}

    def advance(what: str, amount: float) -> None:
        nonlocal done
        done += amount
        progress(what, amount)

    if state is not None and state.progress is not None:
        state.restore("tikmix", arm)
        twin = Arm(settings, domains)
        if state.restore("uniform", twin):
            arms["uniform"] = twin
        saved = state.progress
        followed, uniform = (ArmResult.from_dict(saved[name]) for name in ("followed", "uniform"))
        boundaries = [Boundary.from_dict(each) for each in saved["boundaries"]]
        random.bit_generator.state = saved["random"]
        clock.seconds.update(saved["seconds"])
        advance("going on", saved["done"])

    def save() -> None:
        if state is not None:
            content = {
                "followed": followed.to_dict(),
                "uniform": uniform.to_dict(),
                "boundaries": [each.to_dict() for each in boundaries],
                "random": random.bit_generator.state,
                "seconds": dict(clock.seconds),
                "done": done,
            }
            state.write(arms, content)

    def train_to(arm: Arm, until: int, result: ArmResult, what: str) -> None:
        while arm.step < until:
            with clock.measure("training"):
                arm.train_step()
            advance(what, settings.batch)
            if arm.step in settings.evaluations:
                with clock.measure("evaluating"):
                    losses = task_losses(arm.model, reported, settings.curve_rows)
                result.losses.append((arm.step, losses))
                advance(what, _EVALUATION_COST * len(reported) * settings.curve_rows)
            if state is not None and arm.step % state.every == 0:
                save()
        result.drawn = arm.drawn

    def finish(arm: Arm, result: ArmResult) -> None:
        if not result.final:
            with clock.measure("evaluating"):
                result.final = task_losses(arm.model, reported)
            result.parameters = digest(dict(arm.model.named_parameters()))
            save()

    train_to(arm, settings.boundaries[0], followed, "both arms")
    if "uniform" not in arms:
        arms["uniform"] = arm.branch()
        uniform = ArmResult(losses=list(followed.losses), weights=list(followed.weights))
    for start, end in zip(settings.boundaries, (*settings.boundaries[1:], settings.steps), strict=True):
        if any(each.step == start for each in boundaries):
            train_to(arm, end, followed, "TiKMiX-D")
            continue  # before an interruption
        with clock.measure("measuring"):
            matrix = measure(arm.model, arm.optimizer, domains, steered, settings, random)
        advance("TiKMiX-D", rows_measured(settings, len(domains), len(steered)))
        with clock.measure("solving"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the result holds them
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
        boundaries.append(Boundary(start, matrix, arm.weights, message, solution.success))
        followed.weights.append((start, arm.weights))
        save()
        train_to(arm, end, followed, "TiKMiX-D")
    finish(arm, followed)
    train_to(arms["uniform"], settings.steps, uniform, "uniform")
    finish(arms["uniform"], uniform)

    return DemoResult(
        settings=settings,
        tikmix=followed,
        uniform=uniform,
        boundaries=boundaries,
        steered=corpora.steered,
        held_out=corpora.held_out,
        sources=corpora.sources,
        text_bytes={name: len(text) for name, text in corpora.domains.items()},
        missing=corpora.missing,
        seconds=dict(clock.seconds),
        rows={
            "trained per arm": settings.steps * settings.batch,
            "measured": len(boundaries) * rows_measured(settings, len(domains), len(steered)),
        },
    )


def work(settings: DemoSettings, corpora: Corpora) -> float:
    """Return what `demonstrate` reports to ``progress`` in all: about the cost in sequences trained on."""
    shared = settings.boundaries[0]
    evaluations = sum(1 if step <= shared else 2 for step in settings.evaluations)
    return (
        (2 * settings.steps - shared) * settings.batch
        + evaluations * len(corpora.tasks) * settings.curve_rows * _EVALUATION_COST
        + len(settings.boundaries) * rows_measured(settings, len(corpora.domains), len(corpora.steered))
    )


@torch.no_grad()
def task_losses(model: GPT, tasks: Mapping[str, Sequences], rows: int | None = None) -> dict[str, float]:
    """Return the mean cross-entropy in nats per byte of each task, on all of it or ``rows`` sequences spread over it.

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
