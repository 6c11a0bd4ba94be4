"""A checkpoint of the study, runs from it, and the signals measured at it."""

from __future__ import annotations

import dataclasses
import io
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.study.problem import Problem
from benchmarks.study.stage_truth.orders import DataOrder
from benchmarks.study.stage_truth.settings import StageTruthSettings
from benchmarks.study.training import Trainee, sequence_losses
from tikmix_fast import files
from tikmix_fast.demo.demonstration import task_losses
from tikmix_fast.demo.measuring import measure
from tikmix_fast.probes.snapshot import Snapshot

__all__ = ["Checkpoint", "new_arm", "train_checkpoints"]


def train_checkpoints(settings: StageTruthSettings, problem: Problem, seed: int, folder: Path) -> None:
    """Train a seed on the uniform mixture and write the checkpoints that ``folder`` lacks."""
    missing = [step for step in settings.steps if not _path(folder, seed, step).exists()]
    if not missing:
        return
    arm = new_arm(settings, problem, seed)
    while arm.step < max(missing):
        arm.train_on()
        if arm.step in missing:
            content = io.BytesIO()
            torch.save({"tensors": arm.tensors(), "counters": arm.counters()}, content)
            files.write_bytes(_path(folder, seed, arm.step), content.getvalue())


class Checkpoint:
    """The state of a seed after ``step`` steps. Runs start from it, and each leaves it as it was, bit by bit."""

    def __init__(self, settings: StageTruthSettings, problem: Problem, seed: int, step: int, folder: Path) -> None:
        self.settings, self.problem, self.seed, self.step = settings, problem, seed, step
        self._lengths = [len(text) for text in problem.domains.values()]
        arm = new_arm(settings, problem, seed)
        self._used = np.bincount(list(islice(arm.sampler, step * arm.settings.batch)), minlength=sum(self._lengths))
        saved = torch.load(_path(folder, seed, step))
        arm.restore(saved["tensors"], saved["counters"])
        self.arm = arm
        self._snapshot = Snapshot([arm.model, arm.optimizer, arm.sampler])

    def order(self, draw: int) -> DataOrder:
        """Return an order of the data."""
        seed = [self.seed, self.step, draw, 20]
        return DataOrder(self._lengths, self._used, self.settings.horizons[-1], self.arm.settings.batch, seed)

    def run(self, indices: NDArray[np.int64]) -> dict[str, Any]:
        """Train on sequences [steps, batch] and return losses.

        "reported" holds the loss of every task on the text for reports, by horizon. "measured" holds the steered tasks'
        loss on the text that methods may see, at the first horizon.
        """
        arm, settings = self.arm, self.settings
        reported: dict[str, dict[str, float]] = {}
        measured: dict[str, dict[str, float]] = {}
        try:
            for number, batch in enumerate(indices, start=1):
                arm.optimizer.zero_grad()
                rows = torch.stack([arm._data[int(index)] for index in batch])
                sequence_losses(arm.model, rows).mean().backward()
                arm.take_step()
                if number in settings.horizons:
                    reported[str(number)] = task_losses(arm.model, self.problem.reported, settings.rows)
                if number == settings.horizons[0]:
                    measured[str(number)] = task_losses(arm.model, self.problem.steered, settings.rows)
        finally:
            self.restore()
        return {"reported": reported, "measured": measured}

    def influence(self, preconditioner: Literal["adam", "identity"]) -> dict[str, Any]:
        """Measure S [steered tasks, m] with plenty of batches, and its standard error."""
        settings = self.settings
        size = dataclasses.replace(
            self.arm.settings,
            preconditioner=preconditioner,
            task_batches=settings.task_batches,
            domain_batches=settings.domain_batches,
        )
        random = np.random.default_rng([self.seed, self.step, 21])
        try:
            matrix = measure(
                self.arm.model, self.arm.optimizer, self.problem.domains, self.problem.steered, size, random
            )
        finally:
            self.restore()
        return {"values": matrix.values.tolist(), "stderr": np.asarray(matrix.stderr).tolist()}

    def restore(self) -> None:
        """Restore the state of the checkpoint."""
        self._snapshot.restore()
        self.arm.step = self.step


def new_arm(settings: StageTruthSettings, problem: Problem, seed: int) -> Trainee:
    """Return a seed's run before its first step, on the uniform mixture."""
    m = len(problem.domains)
    main = dataclasses.replace(settings.study.main, seed=seed)
    return Trainee(main, problem.domains, np.full(m, 1 / m), settings.study.device)


def _path(folder: Path, seed: int, step: int) -> Path:
    return folder / f"checkpoint-{seed}-{step}.pt"
