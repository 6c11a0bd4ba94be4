"""Train one arm: all ways to choose the mixture share this code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from benchmarks.study import counting
from benchmarks.study.problem import Problem
from benchmarks.study.settings import StudySettings
from tikmix_fast.demo.arm import Arm
from tikmix_fast.demo.corpora import Sequences
from tikmix_fast.demo.demonstration import task_losses
from tikmix_fast.demo.settings import DemoSettings

__all__ = ["Method", "Study", "Trainee", "train"]

Array = NDArray[np.float64]
Around = Callable[[Tensor], AbstractContextManager[Any]]


def _alone(domains: Tensor) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class Study:
    """The knowledge of a method at its start.

    Attributes
    ----------
    settings : StudySettings
    problem : Problem
    seed : int
    folder : Path
        Folder of the runs that several arms share.
    """

    settings: StudySettings
    problem: Problem
    seed: int
    folder: Path

    @property
    def main(self) -> DemoSettings:
        """Settings of this seed's run."""
        return dataclasses.replace(self.settings.main, seed=self.seed)

    @property
    def uniform(self) -> Array:
        """The uniform mixture, [m]."""
        m = len(self.problem.domains)
        return np.full(m, 1 / m)


class Method:
    """A way to choose the mixture. This one never changes it.

    Attributes
    ----------
    flops : float
        Operations spent on the choice so far.
    log : list
        Notes about the choice; plain JSON types.
    """

    def __init__(self, weights: Array) -> None:
        self.weights = weights
        self.flops = 0.0
        self.log: list[Any] = []

    def start(self) -> Array:
        """Return the mixture of the first step, [m]."""
        return self.weights

    def update(self, arm: Trainee) -> Array | None:
        """Return the mixture from the next step on, or None to keep it. Must not change the arm."""
        return None

    def around(self, arm: Trainee) -> Around:
        """Return a function from the domain [B] of each sequence to the context of the next step's passes."""
        return _alone

    def observe(self, step: int, domains: NDArray[np.int64], losses: Array) -> None:
        """Note the result of step ``step``, from 1: the domain and the loss of each sequence, both [B]."""


class Trainee(Arm):
    """An arm whose steps return the domains of their batch."""

    def __init__(self, settings: DemoSettings, domains: Mapping[str, Sequences], weights: Array, device: str) -> None:
        super().__init__(settings, domains)
        self.model.to(torch.device(device))
        self.optimizer = self._make_optimizer()
        self.sampler.set_weights(weights)
        self._ends = np.cumsum([len(text) for text in domains.values()])

    def train_on(self, around: Around = _alone) -> tuple[NDArray[np.int64], Array]:
        """Take one step and return the domain and the loss of each of its sequences, both [B]."""
        indices = list(islice(self.sampler, self.settings.batch))
        domains = np.searchsorted(self._ends, indices, side="right")
        batch = torch.stack([self._data[index] for index in indices])
        self.optimizer.zero_grad()
        with around(torch.from_numpy(domains)):
            losses = sequence_losses(self.model, batch)
            losses.mean().backward()
        self.take_step()
        return domains, losses.detach().double().cpu().numpy()

    def take_step(self) -> None:
        """Take an optimizer step on the present gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.step += 1


def sequence_losses(model: torch.nn.Module, batch: Tensor) -> Tensor:
    """Return the mean cross-entropy of each sequence, [B]."""
    logits = model(batch[:, :-1])
    each = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return each.view(len(batch), -1).mean(1)


def train(study: Study, method: Method) -> dict[str, Any]:
    """Train on the mixtures of ``method`` and return the results as plain JSON types."""
    settings, problem = study.main, study.problem
    arm = Trainee(settings, problem.domains, method.start(), study.settings.device)
    mixtures = [(0, arm.weights)]
    curve = []
    while arm.step < settings.steps:
        changed = method.update(arm)
        if changed is not None:
            arm.sampler.set_weights(changed)
            mixtures.append((arm.step, arm.weights))
        domains, losses = arm.train_on(method.around(arm))
        method.observe(arm.step, domains, losses)
        if arm.step in settings.evaluations:
            curve.append((arm.step, task_losses(arm.model, problem.reported, settings.curve_rows)))
    return {
        "final": task_losses(arm.model, problem.reported),
        "curve": [{"step": step, "tasks": losses} for step, losses in curve],
        "mixtures": [{"step": step, "domains": weights} for step, weights in mixtures],
        "drawn": arm.drawn,
        "sequences": {name: len(text) for name, text in problem.domains.items()},
        "steered": list(problem.steered),
        "flops": {
            "mixing": float(method.flops),
            "training": float(counting.training(settings.model, study.settings.tokens)),
        },
        "log": method.log,
    }
