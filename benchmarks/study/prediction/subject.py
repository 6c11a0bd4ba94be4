"""The checkpoint that the study measures, its text, and one measurement of influence on it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.study.prediction.settings import PredictionSettings
from tikmix_fast import InfluenceEngine, InfluenceMatrix, Projection
from tikmix_fast.demo.arm import Arm
from tikmix_fast.demo.corpora import Corpora, Sequences
from tikmix_fast.demo.gpt import GPT
from tikmix_fast.influence.preconditioners.protocol import Preconditioner

__all__ = ["Array", "Subject", "Texts", "draw", "influence", "interleaved", "spread", "train"]

Array = NDArray[np.float64]
Texts = Mapping[str, Sequences]


@dataclass
class Subject:
    """A model in training, its text, and its earlier weights."""

    settings: PredictionSettings
    seed: int
    arm: Arm
    domains: Texts
    tasks: Texts
    validation: dict[str, Tensor]
    unseen: dict[str, Tensor]
    averaged: dict[str, Tensor]
    path: list[dict[str, Any]] = field(default_factory=list)


def train(settings: PredictionSettings, seed: int, corpora: Corpora, folder: Path) -> Subject:
    """Return the checkpoint of a seed: read from ``folder``, or trained now."""
    training = dataclasses.replace(settings.training, seed=seed)
    length = training.model.length
    domains = {name: Sequences(text, length) for name, text in corpora.domains.items()}
    measured = {name: Sequences(task.measure, length) for name, task in corpora.tasks.items()}
    unseen = {
        name: spread(Sequences(task.report, length), settings.unseen_rows) for name, task in corpora.tasks.items()
    }
    validation = {name: spread(text, settings.validation_rows) for name, text in measured.items()}
    arm = Arm(training, domains)
    subject = Subject(settings, seed, arm, domains, measured, validation, unseen, {})
    path = folder / f"checkpoint-{seed}.pt"
    if not path.exists():
        while arm.step < settings.checkpoint:
            arm.train_step()
            for name, value in arm.model.state_dict().items():
                average = subject.averaged.setdefault(name, value.clone())
                average.lerp_(value, 1 - settings.averaging)
            if settings.checkpoint - arm.step in settings.path_steps:
                state = {"model": arm.model.state_dict(), "optimizer": arm.optimizer.state_dict()}
                subject.path.append(copy.deepcopy(state))
        state = {"model": arm.model.state_dict(), "optimizer": arm.optimizer.state_dict()}
        partial = path.with_suffix(".part")
        torch.save({**state, "averaged": subject.averaged, "path": subject.path}, partial)
        partial.replace(path)
    saved = torch.load(path)
    arm.model.load_state_dict(saved["model"])
    arm.optimizer.load_state_dict(saved["optimizer"])
    arm.step = settings.checkpoint
    subject.averaged, subject.path = saved["averaged"], saved["path"]
    return subject


def spread(text: Sequences, rows: int) -> Tensor:
    """Return ``rows`` sequences spread evenly over a text, or all if there are fewer."""
    count = min(rows, len(text))
    return text.all()[torch.arange(count) * len(text) // count]


def draw(text: Sequences, rows: int, random: np.random.Generator) -> Tensor:
    """Return ``rows`` sequences, without repetition if there are enough."""
    chosen = random.choice(len(text), rows, replace=rows > len(text))
    return text.all()[torch.from_numpy(chosen)]


def interleaved(texts: Texts, rows: int, batch: int, random: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of sequences and their domains, ``rows`` per domain in all."""
    each = max(1, min(rows, batch // len(texts)))
    drawn = [draw(text, rows, random).split(each) for text in texts.values()]
    for parts in zip(*drawn, strict=True):
        yield torch.cat(parts), torch.arange(len(texts)).repeat_interleave(len(parts[0]))


def influence(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    subject: Subject,
    preconditioner: str | Preconditioner,
    samples: Iterator[tuple[Tensor, Tensor]],
    columns: list[str],
    projection: Projection | None = None,
) -> InfluenceMatrix:
    """Measure the influence of the columns on the validation sets."""
    tasks = list(subject.validation)
    engine = InfluenceEngine(
        model,
        columns,
        tasks,
        preconditioner=preconditioner,
        optimizer=optimizer,
        projection=projection,
        batch_dim=0,  # 128 mixtures of 128 bytes leave it ambiguous
    )
    for name, rows in subject.validation.items():
        for batch in rows.split(-(-len(rows) // 4)):
            with engine.task(name):
                model.loss(batch).backward()
    for batch, ids in samples:
        with engine.domains(ids):
            model.loss(batch).backward()
        model.zero_grad()
    return engine.matrix()
