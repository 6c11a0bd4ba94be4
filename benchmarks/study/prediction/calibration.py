"""Calibration: how often 95% intervals of repeated measurements hold the truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.study.prediction.subject import Array, Subject, draw
from tikmix_fast import Adam, InfluenceEngine
from tikmix_fast.demo.settings import DemoSettings
from tikmix_fast.influence.preconditioners.protocol import Preconditioner
from tikmix_fast.matrix.estimator import Estimator

__all__ = ["calibration", "covered", "influence_of_pools"]


def calibration(subject: Subject) -> dict[str, Any]:
    """Repeat measurements of the demonstration's size and count how often intervals hold the truth.

    S is bilinear. So a table of the influence of every task micro-batch of a pool on every domain micro-batch of a pool
    contains every measurement on draws from the pools. Repetitions draw with replacement; the truth is the mean of the
    whole table, which is exact.
    """
    settings, training = subject.settings, subject.settings.training
    random = np.random.default_rng([subject.seed, 9])
    n, m = len(subject.tasks), len(subject.domains)
    tokens = float(training.domain_rows * training.model.length)
    shares: dict[str, list[float]] = {}
    # Both use one pool, so they differ in nothing else.
    for preconditioner in (Adam(), Adam(floor=1.0)):
        table = influence_of_pools(subject, preconditioner)
        truth = table.mean((1, 3))
        for splits in (2, training.task_splits):
            inside = [covered(table, truth, splits, training, tokens, random) for _ in range(settings.repetitions)]
            shares[f"{preconditioner.name}, {splits} splits"] = np.mean(inside, axis=(1, 2)).tolist()
    return {"shares": shares, "cells": n * m}


def influence_of_pools(subject: Subject, preconditioner: Preconditioner) -> Array:
    """Return the influence of every task micro-batch on every domain micro-batch, [n, pool, m, pool]."""
    settings, training, arm = subject.settings, subject.settings.training, subject.arm
    random = np.random.default_rng([subject.seed, 10])
    n, m = len(subject.tasks), len(subject.domains)
    names = [f"{task} {number}" for task in subject.tasks for number in range(settings.pool_task)]
    columns = [f"{domain} {number}" for domain in subject.domains for number in range(settings.pool_domain)]
    engine = InfluenceEngine(
        arm.model,
        columns,
        names,
        preconditioner=preconditioner,
        optimizer=arm.optimizer,
        task_splits=1,
        batch_dim=0,
        check_every=0,
    )
    for task, text in subject.tasks.items():
        pool = draw(text, settings.pool_task * training.task_rows, random)
        for number, batch in enumerate(pool.split(training.task_rows)):
            with engine.task(f"{task} {number}"):
                arm.model.loss(batch).backward()
    for first, text in enumerate(subject.domains.values()):
        rows = draw(text, settings.pool_domain * training.domain_rows, random)
        ids = first * settings.pool_domain + torch.arange(settings.pool_domain).repeat_interleave(training.domain_rows)
        for batch, each in zip(rows.split(settings.batch_rows), ids.split(settings.batch_rows), strict=True):
            with engine.domains(each):
                arm.model.loss(batch).backward()
            arm.model.zero_grad()
    return engine.matrix().values.reshape(n, settings.pool_task, m, settings.pool_domain)


def covered(
    table: Array, truth: Array, splits: int, training: DemoSettings, tokens: float, random: np.random.Generator
) -> NDArray[np.bool_]:
    """Return for each cell [n, m] whether the 95% interval of one drawn measurement holds the truth."""
    n, pool_task, m, pool_domain = table.shape
    batches = random.integers(0, pool_task, (n, training.task_batches))
    micro = random.integers(0, pool_domain, (m, training.domain_batches))
    rows, columns = np.arange(n)[:, None, None, None], np.arange(m)[None, :, None, None]
    drawn = table[rows, batches[:, None, :, None], columns, micro[None, :, None, :]]  # [n, m, task, domain batches]
    dealt = [np.arange(split, training.task_batches, splits) for split in range(splits)]
    queries = np.stack([drawn[:, :, each].mean(2) for each in dealt], axis=1)  # [n, splits, m, domain batches]
    estimator = Estimator(n, m)
    estimator.begin_round(
        np.repeat(np.arange(n), splits).tolist(), [len(each) / training.task_batches for each in dealt] * n
    )
    for number in range(training.domain_batches):
        estimator.add(queries[..., number].reshape(n * splits, m) * tokens, np.full(m, tokens))
    matrix = estimator.matrix([f"task{i}" for i in range(n)], [f"domain{j}" for j in range(m)])
    low, high = matrix.interval()
    return np.asarray((low <= truth) & (truth <= high))
