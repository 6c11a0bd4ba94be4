"""The gain of a change and its error by hand, and what noise alone reaches; ranks against scipy."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from tikmix_fast import InfluenceMatrix, tikmix_d
from tikmix_fast.matrix.estimator import Estimator
from tikmix_fast.mixture.schedule.gain import Gain, expected_gain
from tikmix_fast.mixture.schedule.rank_agreement import RankAgreement, rank_agreement


def measured(scores: np.ndarray, tokens: np.ndarray) -> InfluenceMatrix:
    """Influence of single micro-batches [k, n, m] with their tokens [k, m], by an estimator with exact queries."""
    _, n, m = scores.shape
    estimator = Estimator(n, m)
    # Two equal splits a task: the task side has no error.
    estimator.begin_round([i for i in range(n) for _ in range(2)], [0.5] * (2 * n))
    for score, count in zip(scores, tokens, strict=True):
        estimator.add(np.repeat(score * count, 2, axis=0), count)
    return estimator.matrix([f"t{i}" for i in range(n)], [f"d{j}" for j in range(m)])


def test_the_gain_is_the_scaled_difference_and_its_error_bounds_every_correlation_of_tasks() -> None:
    matrix = InfluenceMatrix.from_values([[4.0, 0.0], [1.0, 2.0]], stderr=[[0.4, 0.8], [0.2, 0.4]])
    gain = expected_gain(matrix, np.array([0.75, 0.25]), np.array([0.5, 0.5]))
    assert gain.total == pytest.approx(0.25 * (4 - 0) / 4 + 0.25 * (1 - 2) / 2)
    assert gain.stderr == pytest.approx(0.25 * math.hypot(0.4 / 4 + 0.2 / 2, 0.8 / 4 + 0.4 / 2))
    assert gain.chance == 1
    assert gain.excess == pytest.approx(gain.total / gain.stderr - 1)


def test_the_joint_error_of_tasks_comes_from_the_micro_batches() -> None:
    random = np.random.default_rng(0)
    shared = random.normal(size=(40, 1, 3))
    scores = 3 + np.concatenate([shared, 1 - shared], axis=1)  # what one task gains the other loses
    tokens = random.integers(1, 9, size=(40, 3)).astype(float)
    matrix = measured(scores, tokens)
    weights, prior = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.3, 0.5])
    scale = matrix.values.max(axis=1)
    step = weights - prior
    # The ratio estimate of each domain's summed score, written for itself.
    variance = 0.0
    for j in range(3):
        summed = (scores[:, :, j] / scale).sum(axis=1)
        mean = np.average(summed, weights=tokens[:, j])
        variance += step[j] ** 2 * 40 / 39 * ((tokens[:, j] * (summed - mean)) ** 2).sum() / tokens[:, j].sum() ** 2
    gain = expected_gain(matrix, weights, prior)
    assert gain.total == pytest.approx((matrix.values @ step / scale).sum())
    assert gain.stderr == pytest.approx(math.sqrt(variance))
    bound = expected_gain(InfluenceMatrix.from_values(matrix.values, stderr=matrix.stderr), weights, prior)
    assert gain.stderr < 0.2 * bound.stderr


def test_one_task_has_its_own_error_with_and_without_a_record() -> None:
    random = np.random.default_rng(1)
    matrix = measured(random.normal(size=(30, 1, 4)), np.full((30, 4), 5.0))
    plain = InfluenceMatrix.from_values(matrix.values, stderr=matrix.stderr)
    mixtures = random.dirichlet(np.ones(4)), random.dirichlet(np.ones(4))
    assert expected_gain(matrix, *mixtures).stderr == pytest.approx(expected_gain(plain, *mixtures).stderr)


def test_the_tasks_own_error_adds_task_by_task() -> None:
    matrix = InfluenceMatrix.from_values([[1.0, 0.0], [2.0, 1.0]], stderr=[[0.0, 0.0], [0.0, 0.0]])
    task_side = np.array([[0.3, 0.4], [0.2, 0.6]])
    matrix = InfluenceMatrix(**{**vars(matrix), "stderr": task_side, "stderr_task": task_side})
    gain = expected_gain(matrix, np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    assert gain.stderr == pytest.approx(math.sqrt(0.3**2 + 0.4**2 + 0.1**2 + 0.3**2))


def test_domains_that_do_not_move_or_were_never_measured_do_not_count() -> None:
    values = np.array([[2.0, 1.0, 7.0, np.nan]])
    errors = np.array([[0.1, 0.1, np.nan, np.nan]])
    weights, prior = np.array([0.3, 0.2, 0.4, 0.1]), np.array([0.2, 0.3, 0.4, 0.1])
    gain = expected_gain(InfluenceMatrix.from_values(values, stderr=errors), weights, prior)
    assert gain.total == pytest.approx(0.1 / 7)
    assert gain.stderr == pytest.approx(0.1 * math.hypot(0.1, 0.1) / 7)
    assert gain.chance == pytest.approx(math.sqrt(2))
    off = weights + np.array([0.0, -1e-12, 1e-12, 0.0])
    rounded = expected_gain(InfluenceMatrix.from_values(values, stderr=errors), off, prior)
    assert rounded.stderr == pytest.approx(gain.stderr)
    moved = expected_gain(InfluenceMatrix.from_values(values, stderr=errors), prior[[0, 2, 1, 3]], prior)
    assert math.isnan(moved.stderr)
    assert math.isnan(moved.excess)


def test_without_error_any_gain_is_enough() -> None:
    assert Gain(0.1, 0.0, 2.0).excess == math.inf
    assert Gain(-0.1, 0.0, 2.0).excess == -math.inf
    assert Gain(0.0, 0.0, 2.0).excess == -2.0


def test_noise_alone_seldom_exceeds_what_noise_reaches() -> None:
    """Of mixtures that follow nothing but noise. The plain gain in standard errors is far above 1 in every one."""
    random = np.random.default_rng(2)
    uniform = np.full(12, 1 / 12)
    plain, excess = [], []
    for _ in range(1500):
        noise = random.normal(size=(1, 12))
        matrix = InfluenceMatrix.from_values(noise, stderr=np.ones((1, 12)))
        # A small tilt of the uniform mixture, which uses all directions that there are.
        tilted = np.exp(0.1 * noise[0])
        gain = expected_gain(matrix, tilted / tilted.sum(), uniform)
        plain.append(gain.total / gain.stderr)
        excess.append(gain.excess)
    assert np.mean(plain) == pytest.approx(math.sqrt(11), abs=0.1)
    assert np.mean(np.array(plain) > 1) > 0.99
    assert 0.05 < np.mean(np.array(excess) > 1) < 0.11
    assert np.mean(np.array(excess) > 2) < 0.01


def test_the_solver_stays_below_it_on_noise_and_far_above_it_on_influence() -> None:
    random = np.random.default_rng(3)
    errors = random.uniform(0.5, 2.0, size=(3, 8))
    of_noise, of_influence = [], []
    for _ in range(60):
        prior = random.dirichlet(np.full(8, 3.0))
        truth = random.normal(size=(3, 8))
        for found, factor in ((of_noise, 1e-9), (of_influence, 10.0)):
            values = factor * truth + errors * random.normal(size=(3, 8))
            matrix = InfluenceMatrix.from_values(values, stderr=errors)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found.append(expected_gain(matrix, tikmix_d(matrix, prior).weights, prior).excess)
    assert np.mean(np.array(of_noise) > 1) <= 0.05
    assert np.mean(np.array(of_influence) > 1) > 0.5


def test_ranks_are_scipys_over_what_both_have_measured() -> None:
    random = np.random.default_rng(4)
    before, after = random.integers(0, 6, size=(2, 3, 9)).astype(float)  # with ties
    before[:, 2] = np.nan
    after[1] = 1.0  # no order at all
    found = rank_agreement(["a", "b", "c"], before, after, np.array([0.9, 0.9, -0.2]), np.array([0.4, np.nan, 0.8]))
    kept = np.arange(9) != 2
    for i in (0, 2):
        assert found.spearman[i] == pytest.approx(spearmanr(before[i, kept], after[i, kept]).statistic)
        assert found.kendall[i] == pytest.approx(kendalltau(before[i, kept], after[i, kept]).statistic)
    assert math.isnan(found.spearman[1])
    assert math.isnan(found.kendall[1])
    assert found.mean_spearman == pytest.approx((found.spearman[0] + found.spearman[2]) / 2)
    assert found.mean_kendall == pytest.approx((found.kendall[0] + found.kendall[2]) / 2)
    assert found.ceiling == (pytest.approx(0.6), pytest.approx(math.nan, nan_ok=True), 0.0)
    assert found.mean_ceiling == pytest.approx(0.3)


def test_two_domains_have_no_ranks() -> None:
    found = rank_agreement(["a"], np.array([[1.0, 2.0]]), np.array([[1.0, 2.0]]), np.ones(1), np.ones(1))
    assert math.isnan(found.mean_spearman)
    assert math.isnan(RankAgreement((), (), (), ()).mean_spearman)


def test_the_ceiling_is_where_two_measurements_of_the_same_agree() -> None:
    random = np.random.default_rng(5)
    truth = random.normal(size=(1, 1, 15))
    agreements = []
    for _ in range(60):
        # Noise on both sides of every micro-batch: splits of the task do not share the domains' noise.
        pair = [measured(truth + 2.5 * random.normal(size=(12, 1, 15)), np.ones((12, 15))) for _ in range(2)]
        reliability = [each.split_half(draws=20).whole for each in pair]
        agreements.append(rank_agreement(["a"], pair[0].values, pair[1].values, *reliability))
    assert np.mean([each.mean_ceiling for each in agreements]) == pytest.approx(
        np.mean([each.mean_spearman for each in agreements]), abs=0.06
    )
