"""The cautious mixture: what is known less moves less, never more, and no constraint is given up for it."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from scipy.stats import t as student

from tikmix_fast import InfluenceMatrix, tikmix_d
from tikmix_fast.mixture.direct.confidence import cautious_step, known_shares
from tikmix_fast.mixture.direct.problem import Problem, kl_divergence

SEEDS = st.integers(0, 2**32 - 1)


def quiet(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tikmix_d(*arguments, **options)


def problem(seed, n, m):
    """Draw influence, its errors and a prior; errors differ between cells by a factor of ten or so."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, m)) + rng.choice([0.0, 0.5])
    errors = 0.5 * rng.lognormal(sigma=0.8, size=(n, m))
    return values, errors, rng.dirichlet(np.full(m, rng.choice([0.5, 3.0])))


def step(result):
    return np.abs(result.weights - result.prior).sum()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(SEEDS, st.integers(1, 6), st.integers(2, 15), st.sampled_from([1.0, 0.1]), st.booleans())
def test_a_larger_error_never_moves_more(seed, n, m, diversity, pareto):
    values, errors, prior = problem(seed, n, m)
    rng = np.random.default_rng(seed)
    options = {"diversity": diversity, "confidence": 0.8, "pareto": pareto}
    last = np.inf
    for factor in (0.0, 0.05, 0.3, 1.0, 3.0):
        # Each grows by a factor of its own, some to unknown at the end.
        grown = errors * factor ** rng.uniform(0.5, 1.5) if factor else errors * 0
        result = quiet(InfluenceMatrix.from_values(values, stderr=grown), prior, **options)
        assert step(result) <= last + 1e-7
        last = step(result)
        errors = np.maximum(errors, grown) * rng.uniform(1, 1.5, size=errors.shape)
        scaled = values / np.abs(values).max(axis=1, keepdims=True)
        assert not pareto or (scaled @ result.weights >= scaled @ prior - 1e-6).all()
    unknown = np.where(rng.random((1, m)) < 0.5, np.nan, grown)
    assert step(quiet(InfluenceMatrix.from_values(values, stderr=unknown), prior, **options)) <= last + 1e-7


@settings(deadline=None, max_examples=60, derandomize=True)
@given(SEEDS, st.integers(1, 6), st.integers(2, 15), st.booleans())
def test_smaller_shares_never_move_more(seed, n, m, pareto):
    """The same of the step alone: whatever the shares are, if none grows, the weight moved does not."""
    values, _, prior = problem(seed, n, m)
    rng = np.random.default_rng(seed)
    whole = quiet(values, prior, diversity=0.3, pareto=pareto)
    scaled = values / np.abs(values).max(axis=1, keepdims=True)
    given_problem = Problem(scaled, -scaled.sum(0), prior, np.zeros(m), np.ones(m), 1.0, 0.3, pareto)
    shares, last = np.ones(m), step(whole) + 1e-7
    for _ in range(5):
        shares = shares * rng.uniform(0.3, 1.0, size=m) * (rng.random(m) < 0.9)
        weights = cautious_step(given_problem, whole.weights, shares)
        assert not given_problem.violations(weights)
        moved = np.abs(weights - prior).sum()
        assert moved <= last + 1e-7
        last = moved
        # No domain overtakes the plain solution, nor its share of the way.
        assert (np.abs(weights - prior) <= shares * np.abs(whole.weights - prior) + 1e-9).all()
        assert ((weights - prior) * (whole.weights - prior) >= -1e-12).all()
        assert kl_divergence(weights, prior) <= kl_divergence(whole.weights, prior) + 1e-9


@settings(deadline=None, max_examples=30, derandomize=True)
@given(SEEDS, st.integers(1, 6), st.integers(2, 15))
def test_both_ends(seed, n, m):
    values, _, prior = problem(seed, n, m)
    plain = quiet(InfluenceMatrix.from_values(values), prior)
    for confidence in (0.5, 0.99):
        sure = quiet(InfluenceMatrix.from_values(values, stderr=np.zeros((n, m))), prior, confidence=confidence)
        np.testing.assert_allclose(sure.weights, plain.weights, atol=1e-12)
        assert (sure.known == 1).all()
        for nothing in (np.inf, np.nan, 1e6):
            unsure = quiet(
                InfluenceMatrix.from_values(values, stderr=np.full((n, m), nothing)), prior, confidence=confidence
            )
            np.testing.assert_allclose(unsure.weights, unsure.prior, atol=1e-15)
            assert (unsure.known == 0).all()
            assert unsure.success


def test_more_confidence_moves_less():
    values, errors, prior = problem(5, 3, 8)
    matrix = InfluenceMatrix.from_values(values, stderr=0.4 * errors)
    steps = [step(tikmix_d(matrix, prior, pareto=False, confidence=each)) for each in (0.01, 0.3, 0.6, 0.9, 0.999)]
    assert (np.diff(steps) < 0).any()
    assert (np.diff(steps) <= 1e-12).all()
    assert steps[0] == pytest.approx(step(tikmix_d(matrix, prior, pareto=False)), rel=0.05)


def test_shares_written_out():
    values = np.array([[1.0, 2.0, 4.0], [0.0, 1.0, -2.0]])
    errors = np.array([[0.1, 0.2, 3.0], [0.2, 0.1, 0.1]])
    prior = np.array([0.5, 0.25, 0.25])
    matrix = replace(
        InfluenceMatrix.from_values(values, stderr=errors), dof=np.array([[5.0, np.inf, 9.0], [3.0, np.inf, 9.0]])
    )
    shares = known_shares(matrix, np.array([2.0, 1.0]), prior, 0.8)
    scaled, of_error = values / [[2.0], [1.0]], errors / [[2.0], [1.0]]
    # The prior mixture's influence is 2 and -0.25.
    for j, quantile in enumerate((student.ppf(0.9, 3), norm.ppf(0.9), student.ppf(0.9, 9))):
        difference = np.hypot(scaled[0, j] - 1.0, scaled[1, j] + 0.25)
        expected = 1 - quantile * np.hypot(*of_error[:, j]) / difference
        assert shares[j] == pytest.approx(max(expected, 0), abs=1e-9)
    assert shares[2] < shares[0] < shares[1] < 1


def test_the_bound_is_a_confidence_bound():
    """|d| - t |e| is below the true |d| at least as often as promised, for errors that tasks share too."""
    rng = np.random.default_rng(0)
    for n, m, shared in ((1, 4000, 0.0), (4, 4000, 0.0), (4, 4000, 0.9)):
        truth = rng.normal(size=(n, m))
        truth -= truth.mean(axis=1, keepdims=True)
        noise = np.sqrt(shared) * rng.normal(size=(1, m)) + np.sqrt(1 - shared) * rng.normal(size=(n, m))
        matrix = InfluenceMatrix.from_values(truth + 0.3 * noise, stderr=np.full((n, m), 0.3))
        shares = known_shares(matrix, np.ones(n), np.full(m, 1 / m), 0.9)
        seen = np.linalg.norm(matrix.values - matrix.values.mean(axis=1, keepdims=True), axis=0)
        assert (shares * seen <= np.linalg.norm(truth, axis=0)).mean() >= 0.89


NAMES = ("web", "code", "books", "maths")
INFLUENCE = np.array([[1.0, 0.2, 0.5, -0.6], [0.1, 1.0, 0.2, -0.4]])
PRIOR = {"web": 0.4, "code": 0.2, "books": 0.2, "maths": 0.2}
ERRORS = np.full((2, 4), 0.1)


def made(errors, **changes):
    values = np.array(changes.get("values", INFLUENCE))
    return InfluenceMatrix.from_values(values, tasks=["qa", "python"], domains=NAMES, stderr=errors)


def test_a_domain_of_unknown_error_stays_and_others_move():
    errors = ERRORS.copy()
    errors[1, 2] = np.nan
    result = tikmix_d(made(errors), PRIOR, confidence=0.8)
    assert result.as_dict()["books"] == pytest.approx(0.2, abs=1e-15)
    assert result.as_dict()["code"] > 0.22
    assert result.known[2] == 0
    assert "confidence 0.8 left" in result.message


def test_unmeasured_domains_keep_their_prior():
    values = INFLUENCE.copy()
    values[:, 1] = np.nan
    errors = np.where(np.isnan(values), np.nan, 0.01)
    result = tikmix_d(made(errors, values=values), PRIOR, confidence=0.9)
    assert result.kept == ("code",)
    assert result.as_dict()["code"] == 0.2
    assert result.as_dict()["maths"] < 0.2
    nothing = tikmix_d(made(np.full((2, 4), np.nan), values=np.full((2, 4), np.nan)), PRIOR, confidence=0.9)
    np.testing.assert_allclose(nothing.weights, nothing.prior)


def test_pareto_is_kept_where_the_balanced_step_would_break_it():
    # Moving from b to a alone harms the second task; c, which makes up for it, is hardly known.
    values = np.array([[3.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
    prior = np.array([0.2, 0.6, 0.2])
    errors = np.array([[0.0, 0.0, 0.3], [0.0, 0.0, 0.3]])
    plain = tikmix_d(InfluenceMatrix.from_values(values, stderr=errors), prior)
    cautious = tikmix_d(InfluenceMatrix.from_values(values, stderr=errors), prior, confidence=0.8)
    naive = prior + cautious.known * (plain.weights - prior)
    assert naive[0] - prior[0] > cautious.weights[0] - prior[0] + 0.01, "the balanced step would not do"
    assert (cautious.predicted >= cautious.predicted_prior - 1e-8).all()
    assert 0.01 < step(cautious) < step(plain)
    # What b loses, a and c gain; for the second task 2 (gain of c) must make up for 1 (gains of both).
    gains = cautious.weights - prior
    assert gains[0] == pytest.approx(gains[2], abs=1e-6)
    assert "pareto: task1" in cautious.active


def test_constraints_hold_with_confidence():
    options = {"cap": {"code": 0.3}, "floor": {"maths": 0.15}, "max_kl": 0.01, "confidence": 0.7}
    result = tikmix_d(made(ERRORS), PRIOR, **options)
    assert 0 < step(result) < step(tikmix_d(made(ERRORS), PRIOR, **{**options, "confidence": None}))
    assert result.as_dict()["code"] <= 0.3
    assert result.as_dict()["maths"] >= 0.15
    assert kl_divergence(result.weights, result.prior) < 0.01
    smooth = tikmix_d(made(ERRORS), PRIOR, **options, smoothing=0.5)
    np.testing.assert_allclose(smooth.weights - smooth.prior, 0.5 * (result.weights - result.prior), atol=1e-9)


def test_terms_are_of_the_weights_returned(paper):
    result = tikmix_d(made(ERRORS), PRIOR, confidence=0.9)
    assert result.fun == pytest.approx(paper.objective(paper.scaled(INFLUENCE), result.weights), abs=1e-12)
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert content["known"] == result.known.tolist()
    assert tikmix_d(made(ERRORS), PRIOR).known is None


@pytest.mark.parametrize("confidence", [0, 1, -0.5, 95, float("nan")])
def test_confidence_out_of_range(confidence):
    with pytest.raises(ValueError, match="confidence must"):
        tikmix_d(made(ERRORS), PRIOR, confidence=confidence)


def test_what_confidence_needs():
    with pytest.raises(TypeError, match="confidence must be a number"):
        tikmix_d(made(ERRORS), PRIOR, confidence="high")
    with pytest.raises(ValueError, match="confidence needs standard errors: pass an InfluenceMatrix"):
        tikmix_d(INFLUENCE, list(PRIOR.values()), confidence=0.9)
    with pytest.raises(ValueError, match="confidence must be None where the prior is outside the bounds"):
        tikmix_d(made(ERRORS), PRIOR, cap={"web": 0.3}, confidence=0.9)
