"""Measure Group Influence at the current weights of a model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tikmix_fast.demo.corpora import Sequences
from tikmix_fast.demo.gpt import GPT
from tikmix_fast.demo.settings import DemoSettings
from tikmix_fast.influence.engine import InfluenceEngine
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix

__all__ = ["measure", "rows_measured"]


def measure(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    domains: Mapping[str, Sequences],
    tasks: Mapping[str, Sequences],
    settings: DemoSettings,
    random: np.random.Generator,
) -> InfluenceMatrix:
    """Measure the influence of every domain on every task on new random sequences. The model stays as it is.

    Every domain gets the same number of tokens, independent of its weight.

    Notes
    -----
    Cost: a little more than training on `rows_measured` sequences.
    """
    engine = InfluenceEngine(
        model,
        domains=list(domains),
        tasks=list(tasks),
        preconditioner=settings.preconditioner,
        optimizer=optimizer,
        task_splits=settings.task_splits,
    )
    for name, text in tasks.items():
        for batch in _draw(text, settings.task_batches, settings.task_rows, random):
            with engine.task(name):
                model.loss(batch).backward()
    mixed = zip(
        *(_draw(text, settings.domain_batches, settings.domain_rows, random) for text in domains.values()), strict=True
    )
    ids = torch.arange(len(domains)).repeat_interleave(settings.domain_rows)
    for batches in mixed:
        with engine.domains(ids):
            model.loss(torch.cat(batches)).backward()
        model.zero_grad()
    return engine.matrix()


def rows_measured(settings: DemoSettings, domains: int, tasks: int) -> int:
    """Return the number of sequences in one measurement."""
    return tasks * settings.task_batches * settings.task_rows + domains * settings.domain_batches * settings.domain_rows


def _draw(text: Sequences, batches: int, rows: int, random: np.random.Generator) -> list[Tensor]:
    # Draw with replacement only if the text is too short.
    chosen = random.choice(len(text), batches * rows, replace=batches * rows > len(text))
    return [text.all()[torch.from_numpy(part)] for part in np.split(chosen, batches)]
