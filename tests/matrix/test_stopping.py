"""Measuring ends when the error is small enough, when it cannot fall further, or when the batches do."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn

from tikmix_fast import InfluenceEngine
from tikmix_fast.matrix.estimator import Estimator
from tikmix_fast.matrix.stopping import until_known

TASKS, DOMAINS = ("qa", "code"), ("a", "b", "c", "d")


def measure(rel_error, *, task_noise=0.0, noise=1.0, most=400, least=8, only=DOMAINS, seed=0):
    """Measure a known truth batch by batch; return how many batches it took, and the matrix."""
    random = np.random.default_rng(seed)
    truth = np.array([[0.0, 1.0, 2.0, 3.0], [3.0, 1.0, 0.0, 0.0]])
    of_split = np.repeat(truth, 2, axis=0) + task_noise * np.array([1, -1, 1, -1])[:, None]
    tokens = np.array([10.0 * (domain in only) for domain in DOMAINS])
    estimator, taken = Estimator(2, 4), 0
    estimator.begin_round([0, 0, 1, 1], [0.5] * 4)
    for _ in until_known(range(most), lambda: estimator.matrix(TASKS, DOMAINS), rel_error, least):
        scores = of_split + noise * np.repeat(random.normal(size=(2, 4)), 2, axis=0)
        estimator.add(scores * tokens, tokens)
        taken += 1
    return taken, estimator.matrix(TASKS, DOMAINS)


def test_stops_when_the_error_is_small_enough(caplog):
    taken, matrix = measure(0.1)
    assert (matrix.relative_error() <= 0.1).all()
    # Spreads are about 1.3, so 0.1 of it is a standard error of 0.13: some 60 micro-batches of noise 1.
    assert 30 < taken < 120
    assert not caplog.records
    assert measure(0.2)[0] < taken / 2


def test_never_on_fewer_than_least():
    assert measure(0.5, noise=0.01, least=8)[0] == 8
    assert measure(0.5, noise=0.01, least=3)[0] == 3


def test_stops_where_only_the_task_side_is_left(caplog):
    with caplog.at_level(logging.WARNING):
        taken, matrix = measure(0.2, task_noise=1.0)
    assert taken < 200
    assert (matrix.relative_error("domain") <= 0.1).all()
    assert (matrix.relative_error() > 0.2).any()
    assert "the domains' part is small" in caplog.text


def test_says_so_when_the_batches_end(caplog):
    with caplog.at_level(logging.WARNING):
        taken, _ = measure(0.01, most=20)
    assert taken == 20
    assert "the batches ended before the relative error was 0.01" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        taken, _ = measure(10.0, most=20, only=("a", "b", "c"))
    assert taken == 20, "a domain that never comes is not known"
    assert "domain 'd' has 0 micro-batches" in caplog.text


@pytest.mark.parametrize(("rel_error", "least"), [(0, 8), (-1, 8), (float("nan"), 8), (0.1, 1), (0.1, 2.5)])
def test_bad_arguments_are_refused_at_once(rel_error, least):
    with pytest.raises(ValueError, match=r"rel_error must be above 0|least must be an int"):
        until_known([], Estimator(1, 1).matrix, rel_error, least)


def test_one_domain_is_refused_at_once():
    engine = InfluenceEngine(nn.Linear(4, 1), ["web"], ["qa"], preconditioner="identity")
    with pytest.raises(ValueError, match=r"at least two for run_until.*'web'"):
        engine.run_until([])


def test_engine():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    engine = InfluenceEngine(model, ["web", "code"], ["qa"], preconditioner="identity", task_splits=4)
    for _ in range(4):
        with engine.task("qa"):
            (model(torch.ones(8, 4) + 0.01 * torch.randn(8, 4)) ** 2).mean().backward()
    taken = 0
    for rows in engine.run_until((torch.randn(8, 4) for _ in range(500)), rel_error=0.2):
        with engine.domains(torch.tensor([0] * 4 + [1] * 4)):
            (model(rows + torch.tensor([[1.0]] * 4 + [[-0.2]] * 4)) ** 2).mean().backward()
        taken += 1
    assert 8 <= taken < 500
    assert (engine.matrix().relative_error() <= 0.2).all()
