"""S by every method, against the change of the tasks' losses after real optimizer steps on one domain."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.study.prediction.settings import Method
from benchmarks.study.prediction.subject import Array, Subject, draw, influence, interleaved
from tikmix_fast import EKFAC, Adam, DiagonalFisher, Projection
from tikmix_fast.demo.arm import Arm
from tikmix_fast.demo.gpt import GPT
from tikmix_fast.influence.preconditioners.protocol import Preconditioner

__all__ = ["counterfactual", "gains", "long", "measure_method"]


def curvature(model: GPT, subject: Subject, method: Method) -> str | Preconditioner:
    """Return the preconditioner of a method, fitted on the domains in equal parts."""
    if method.preconditioner == "adam":
        return Adam(floor=method.floor)
    if method.preconditioner == "identity":
        return "identity"
    random = np.random.default_rng([subject.seed, 3])
    rows = -(-subject.settings.fisher_rows // len(subject.domains))
    batches = [batch for batch, _ in interleaved(subject.domains, rows, subject.settings.batch_rows, random)]
    kind = EKFAC if method.preconditioner == "ekfac" else DiagonalFisher
    return kind(damping=method.damping, seed=subject.seed).fit(model, batches, _loss)


def _loss(model: Any, batch: Tensor) -> Tensor:
    loss: Tensor = model.loss(batch)
    return loss


def measurement_points(subject: Subject, method: Method) -> list[tuple[GPT, torch.optim.Optimizer]]:
    """Return the weights at which a method takes gradients, each with its optimizer."""
    arm = subject.arm
    if method.weights == "current":
        return [(arm.model, arm.optimizer)]
    if method.weights == "path":
        return [(arm.model, arm.optimizer), *(_point(_earlier(subject, state)) for state in subject.path)]
    branch = arm.branch()
    if method.weights == "averaged":
        branch.model.load_state_dict(subject.averaged)
    elif method.weights == "decayed":
        _decay(subject, branch)
    else:
        _coast(subject, branch)
    return [_point(branch)]


def _point(arm: Arm) -> tuple[GPT, torch.optim.Optimizer]:
    return arm.model, arm.optimizer


def _earlier(subject: Subject, state: dict[str, Any]) -> Arm:
    branch = subject.arm.branch()
    branch.model.load_state_dict(state["model"])
    branch.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
    return branch


def _decay(subject: Subject, branch: Arm) -> None:
    """Take a few steps on the uniform mixture, at a rate that falls to zero."""
    arm = subject.arm
    random = np.random.default_rng([subject.seed, 4])
    count, rate, rows = subject.settings.decay_steps, arm.learning_rate(), arm.settings.batch
    texts = list(subject.domains.values())
    for step in range(count):
        which = random.permutation(np.arange(rows) % len(texts))
        batch = torch.cat([draw(texts[each], 1, random) for each in which])
        optimizer_step(branch, batch, rate * (1 - (step + 0.5) / count))


def _coast(subject: Subject, branch: Arm) -> None:
    """Take a few steps with zero gradients."""
    for _ in range(subject.settings.coast_steps):
        for parameter in branch.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        take_step(branch, subject.arm.learning_rate())


def measure_method(subject: Subject, method: Method) -> Array:
    """Return S [n, m] by a method; every method sees the same sequences."""
    settings = subject.settings
    values = []
    for number, (model, optimizer) in enumerate(measurement_points(subject, method)):
        samples = np.random.default_rng([subject.seed, 2, number])
        projection = None if method.dim is None else Projection(dim=method.dim, seed=subject.seed)
        batches = interleaved(subject.domains, settings.domain_rows, settings.batch_rows, samples)
        preconditioner = curvature(model, subject, method)
        columns = list(subject.domains)
        matrix = influence(model, optimizer, subject, preconditioner, batches, columns, projection)
        values.append(matrix.values)
    return np.asarray(np.mean(values, axis=0), dtype=np.float64)


def optimizer_step(arm: Arm, batch: Tensor, rate: float) -> None:
    """Take the training step of this batch at this rate."""
    arm.optimizer.zero_grad()
    arm.model.loss(batch).backward()
    torch.nn.utils.clip_grad_norm_(arm.model.parameters(), arm.settings.clip)
    take_step(arm, rate)


def take_step(arm: Arm, rate: float) -> None:
    """Take an optimizer step on the present gradients, at this rate."""
    for group in arm.optimizer.param_groups:
        group["lr"] = rate
    arm.optimizer.step()


@torch.no_grad()
def losses(model: GPT, rows: Mapping[str, Tensor]) -> Array:
    """Return the loss of every task [n]."""
    return np.array([float(model.loss(each)) for each in rows.values()])


def gains(subject: Subject, rates: tuple[float, ...], steps: tuple[int, ...]) -> dict[str, Any]:
    """Train on one domain at a time from the checkpoint, and return how much each task's loss fell.

    The result maps "validation" and "unseen" to a mapping from ``"RATE/STEPS"`` to [2, n, m]; the first axis holds two
    draws of the training sequences.
    """
    arm = subject.arm
    judges = {"validation": subject.validation, "unseen": subject.unseen}
    before = {name: losses(arm.model, rows) for name, rows in judges.items()}
    shape = (2, len(subject.tasks), len(subject.domains))
    decreases = {name: {f"{rate:g}/{k}": np.zeros(shape) for rate in rates for k in steps} for name in judges}
    for rate, number, (column, text) in product(rates, range(2), enumerate(subject.domains.values())):
        random = np.random.default_rng([subject.seed, 5, number, column])
        branch = arm.branch()
        for step in range(1, max(steps) + 1):
            optimizer_step(branch, draw(text, arm.settings.batch, random), arm.learning_rate() * rate)
            if step in steps:
                for name, rows in judges.items():
                    decrease = before[name] - losses(branch.model, rows)
                    decreases[name][f"{rate:g}/{step}"][number, :, column] = decrease
    return {name: {cell: values.tolist() for cell, values in cells.items()} for name, cells in decreases.items()}


def counterfactual(subject: Subject) -> dict[str, Any]:
    """Return real gains, and S by every method."""
    influences = {method.name: measure_method(subject, method).tolist() for method in subject.settings.methods}
    return {"gains": gains(subject, subject.settings.rates, subject.settings.steps), "influence": influences}


def long(subject: Subject) -> dict[str, Any]:
    """Return the gains after more steps, at the full rate."""
    return {"gains": gains(subject, (1.0,), subject.settings.long_steps)}
