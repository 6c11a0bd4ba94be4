"""Plans of in-run measuring: counted by hand, within the budget, and as noisy as they say."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tikmix_fast import InfluenceEngine
from tikmix_fast.influence.in_run.plan import _expected_error, plan_in_run
from tikmix_fast.matrix.estimator import Estimator


def engine(tasks=3, domains=5, **options):
    names = [f"t{k}" for k in range(tasks)], [f"d{k}" for k in range(domains)]
    return InfluenceEngine(nn.Linear(4, 4), names[1], names[0], preconditioner="identity", **options)


def test_counted_by_hand():
    sizes = {"step_tokens": 10_000, "sequence_tokens": 500, "micro_batches": 2}
    plan = engine().plan(budget=0.05, **sizes, near_every=8, flops_per_byte=10)
    tasks = 3 * 2 * 500
    queries = 6 * 30 * 10 / 6
    domains = 2 * 6 * (6 * 5 + 8 * 10) / 6
    every = math.ceil((tasks + queries + domains) * 9 / 8 / 500)
    assert (plan.every, plan.task_sequences, plan.task_tokens) == (every, 2, tasks)
    for part, cost in ((plan.of_tasks, tasks), (plan.of_queries, queries), (plan.of_domains, domains)):
        assert part == pytest.approx(cost * 9 / 8 / every / 10_000)
    assert plan.overhead == pytest.approx(plan.of_tasks + plan.of_queries + plan.of_domains)
    assert str(plan).startswith(f"measure every {every}th step: 3 tasks x 2 sequences of 500 tokens, overhead 5.0% of")


@settings(max_examples=200, deadline=None)
@given(
    budget=st.floats(0.001, 2.0),
    tasks=st.integers(1, 12),
    splits=st.integers(1, 4),
    domains=st.integers(1, 40),
    step_tokens=st.integers(100, 10_000_000),
    sequence_tokens=st.integers(1, 8192),
    micro_batches=st.integers(1, 64),
    near_every=st.sampled_from([0, 1, 8]),
)
def test_within_the_budget_and_no_rarer_than_need_be(budget, **options):
    plan = plan_in_run(budget, **options)
    assert plan.overhead <= budget * (1 + 1e-12)
    assert plan.task_sequences >= options["splits"]
    if plan.every == 1:
        return
    assert plan.task_sequences == options["splits"]
    if plan.every > 2:
        more_often = plan.overhead * plan.every / (plan.every - 1)
        assert more_often > budget * (1 - 1e-9), "one step earlier would not fit"


def test_a_large_budget_goes_into_more_sequences():
    plan = engine().plan(budget=1.0, step_tokens=100_000, sequence_tokens=100)
    assert plan.every == 1
    assert plan.task_sequences > 100
    assert "every step" in str(plan)


def measured(steps, splits_tokens, domain_tokens, seed=0, n=2, m=200, fresh=False):
    """A matrix of known signal and noise; ``fresh``: new task batches at every step."""
    random, estimator, d = np.random.default_rng(seed), Estimator(n, m), 10
    truth = np.random.default_rng(9)
    tasks, domains = truth.normal(size=(n, d)), truth.normal(size=(m, d))
    owners = np.repeat(np.arange(n), 2)
    queries = None
    for _ in range(steps):
        if fresh or queries is None:
            noise = random.normal(size=(2 * n, d)) * 20 / math.sqrt(splits_tokens)
            queries = tasks[owners] + noise
            estimator.begin_round(owners.tolist(), [0.5] * (2 * n))
        gradients = domains + random.normal(size=(m, d)) * 30 / math.sqrt(domain_tokens)
        estimator.add(queries @ gradients.T * domain_tokens, np.full(m, float(domain_tokens)))
    names = [f"t{k}" for k in range(n)], [f"d{k}" for k in range(m)]
    return estimator.matrix(*names), tasks @ domains.T


def test_expected_error_is_what_measuring_then_finds():
    # Earlier: 16 micro-batches of 400 tokens per domain, tasks of 2 x 3200 tokens, queries made once.
    found = [measured(16, 3200, 400, seed)[0] for seed in range(30)]
    plans = [
        plan_in_run(
            0.05, tasks=2, splits=2, domains=200, step_tokens=200 * 50, sequence_tokens=100, near_every=0,
            flops_per_byte=1.0, matrix=matrix, task_tokens=6400, time_constant=1000.0,
        )
        for matrix in found
    ]  # fmt: skip
    steps = round(2 * 1000 / plans[0].every)
    assert plans[0].task_sequences == 2
    expected = np.sqrt(np.mean([plan.relative_error**2 for plan in plans], axis=0))
    actual = []
    for seed in range(6):
        matrix, truth = measured(steps, 100, 50, 1000 + seed, fresh=True)
        noise = ((matrix.values - truth) ** 2).mean(1)
        actual.append(noise / (noise + truth.var(axis=1, ddof=1)))
    assert expected == pytest.approx(np.sqrt(np.mean(actual, axis=0)), rel=0.2)
    assert "relative error of S expected" in str(plans[0])


@pytest.mark.parametrize("redraw", [True, False])
def test_expected_error_with_projections(redraw):
    matrix, _ = measured(16, 3200, 400)
    # The same measurement through projections: their variance comes on top of the other parts, which stay as they are.
    of_projection = np.full(matrix.values.shape, 2.0)
    projected = dataclasses.replace(
        matrix,
        stderr=np.sqrt(matrix.stderr**2 + of_projection**2),
        stderr_projection=of_projection,
        settings={**matrix.settings, "projection": {"redraw": redraw}},
    )
    steps = 100.0
    options = {"task_tokens": 6400, "steps": steps, "step_tokens": 200 * 50, "of_task": 200}
    plain, found = _expected_error(matrix, **options), _expected_error(projected, **options)
    # relative error^2 = noise / (noise + signal), and the signal is the same: the noise grows by the projections'.
    signal = np.nanvar(matrix.values, axis=1, ddof=1) - np.nanmean(matrix.stderr**2, axis=1)
    noise = signal * plain**2 / (1 - plain**2)
    less_signal = signal - 4.0
    assert (less_signal > 0).all()
    expected = noise + (4.0 / steps if redraw else 4.0)
    assert found == pytest.approx(np.sqrt(expected / (expected + less_signal)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0.0}, "budget"),
        ({"budget": float("nan")}, "budget"),
        ({"step_tokens": 0}, "step_tokens"),
        ({"sequence_tokens": 1.5}, "sequence_tokens"),
        ({"micro_batches": 0}, "micro_batches"),
        ({"near_every": -1}, "near_every"),
        ({"flops_per_byte": 0.0}, "flops_per_byte"),
        ({"time_constant": 0.0}, "time_constant"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        engine().plan(**{"step_tokens": 100, "sequence_tokens": 10, **options})


def test_an_earlier_matrix_needs_errors_and_tokens():
    matrix, _ = measured(4, 400, 100)
    options = {"step_tokens": 100, "sequence_tokens": 10, "matrix": matrix}
    with pytest.raises(ValueError, match="task_tokens"):
        engine(2, 200).plan(**options)
    with pytest.raises(ValueError, match="errors of both sides"):
        engine(2, 200).plan(**{**options, "matrix": type(matrix).from_values(matrix.values)}, task_tokens=800)
