import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tikmix_fast import InfluenceMatrix, tikmix_d

SOLVERS = pytest.mark.parametrize("solver", ["slsqp", "interior"])
NAMES = ("web", "code", "books", "maths", "noise")
INFLUENCE = np.array([[1.0, 0.2, 0.5, 0.1, -0.6], [0.1, 1.0, 0.2, 0.6, -0.4], [0.3, 0.4, 0.2, 1.0, -0.5]])
MATRIX = InfluenceMatrix.from_values(INFLUENCE, tasks=["qa", "python", "sums"], domains=NAMES)
PRIOR = {"web": 0.4, "code": 0.2, "books": 0.2, "maths": 0.1, "noise": 0.1}
P0 = np.array([PRIOR[name] for name in NAMES])


def divergence(weights, prior):
    positive = weights > 0
    return (weights[positive] * np.log(weights[positive] / prior[positive])).sum()


# --- each constraint holds, binds, and leaves the optimum of what is left


@SOLVERS
def test_floor(solver, paper):
    free = tikmix_d(MATRIX, PRIOR, solver=solver)
    assert free.as_dict()["noise"] < 0.04
    result = tikmix_d(MATRIX, PRIOR, solver=solver, floor={"noise": 0.05})
    assert result.as_dict()["noise"] == pytest.approx(0.05, abs=1e-9)
    assert "floor: noise" in result.active
    lower = np.r_[0, 0, 0, 0, 0.05]
    assert paper.shortfall(paper.scaled(INFLUENCE), result.weights, P0, lower, 1) < 1e-6


def test_floor_for_all():
    result = tikmix_d(MATRIX, PRIOR, diversity=0.05, floor=0.08)
    assert result.weights.min() == pytest.approx(0.08, abs=1e-9)
    assert {"floor: noise", "floor: books"} <= set(result.active)


@SOLVERS
def test_cap(solver, paper):
    free = tikmix_d(MATRIX, PRIOR, solver=solver)
    assert free.as_dict()["maths"] > 0.2
    result = tikmix_d(MATRIX, PRIOR, solver=solver, cap={"maths": 0.15})
    assert result.as_dict()["maths"] == pytest.approx(0.15, abs=1e-9)
    assert "cap: maths" in result.active
    upper = np.r_[1, 1, 1, 0.15, 1]
    assert paper.shortfall(paper.scaled(INFLUENCE), result.weights, P0, 0, upper) < 1e-6


def test_cap_as_number_and_as_array():
    one = tikmix_d(MATRIX, PRIOR, cap=0.3, pareto=False)
    other = tikmix_d(INFLUENCE, P0, cap=np.full(5, 0.3), pareto=False)
    assert one.weights.max() <= 0.3 + 1e-12
    np.testing.assert_array_equal(one.weights, other.weights)


@SOLVERS
def test_supply(solver):
    # 100 tokens to draw, and at most 1.5 passes over 10 tokens of maths: 0.15 of the mixture.
    supply = {"web": 1e3, "code": np.inf, "books": 1e3, "maths": 10, "noise": 1e3}
    result = tikmix_d(MATRIX, PRIOR, solver=solver, supply=supply, stage_tokens=100, max_epochs=1.5)
    assert result.as_dict()["maths"] == pytest.approx(0.15, abs=1e-9)
    assert "supply: maths" in result.active
    assert "cap: maths" not in result.active
    capped = tikmix_d(MATRIX, PRIOR, solver=solver, cap={"maths": 0.15})
    np.testing.assert_allclose(result.weights, capped.weights, atol=1e-6)


def test_empty_supply_takes_the_domain_out():
    supply = dict.fromkeys(NAMES, 1e6) | {"noise": 0}
    result = tikmix_d(MATRIX, PRIOR | {"noise": 0.0, "web": 0.5}, supply=supply, stage_tokens=100)
    assert result.as_dict()["noise"] == 0


@SOLVERS
def test_kl_limit(solver):
    free = tikmix_d(MATRIX, PRIOR, solver=solver)
    assert divergence(free.weights, P0) > 0.1
    results = [tikmix_d(MATRIX, PRIOR, solver=solver, max_kl=limit) for limit in (0.05, 1e-3, 1e-6)]
    for result, limit in zip(results, (0.05, 1e-3, 1e-6), strict=True):
        assert result.success
        assert "max_kl" in result.active
        assert divergence(result.weights, P0) == pytest.approx(limit, abs=2e-9)
        assert result.fun < tikmix_d(MATRIX, PRIOR, solver="interior", max_kl=limit / 1.1).fun
    assert results[0].fun < results[1].fun < results[2].fun


@SOLVERS
def test_kl_limit_counts_what_is_fixed_elsewhere(solver):
    fixed = {"noise": 0.05}
    result = tikmix_d(MATRIX, PRIOR, solver=solver, floor=fixed, cap=fixed, max_kl=0.04)
    assert result.as_dict()["noise"] == pytest.approx(0.05, abs=1e-12)
    assert divergence(result.weights, P0) == pytest.approx(0.04, abs=2e-9)


def test_kl_limit_that_is_slack_changes_nothing():
    one, other = tikmix_d(MATRIX, PRIOR), tikmix_d(MATRIX, PRIOR, max_kl=5.0)
    np.testing.assert_allclose(one.weights, other.weights, atol=1e-6)
    assert "max_kl" not in other.active


@SOLVERS
def test_kl_limit_keeps_zeros_of_the_prior(solver):
    prior = PRIOR | {"maths": 0.0, "web": 0.5}
    result = tikmix_d(MATRIX, prior, solver=solver, max_kl=0.2)
    assert result.success
    assert result.as_dict()["maths"] == 0


def test_smoothing():
    full = tikmix_d(MATRIX, PRIOR, max_kl=0.05, cap=0.5)
    result = tikmix_d(MATRIX, PRIOR, max_kl=0.05, cap=0.5, smoothing=0.25)
    np.testing.assert_allclose(result.weights, 0.25 * P0 + 0.75 * full.weights, atol=1e-12)
    assert divergence(result.weights, P0) < 0.05
    assert (INFLUENCE @ result.weights >= INFLUENCE @ P0 - 1e-9).all()
    assert full.fun < result.fun
    assert result.terms["influence"] < full.terms["influence"]
    np.testing.assert_array_equal(tikmix_d(MATRIX, PRIOR, smoothing=1.0).weights, P0)


@SOLVERS
def test_pareto_binds_and_can_be_switched_off(solver):
    influence = np.array([[1.0, 0.0, 0.1], [0.9, 0.0, 0.1], [0.0, 0.2, 1.0]])
    prior = [0.1, 0.1, 0.8]
    free = tikmix_d(influence, prior, solver=solver, pareto=False)
    assert (influence @ free.weights)[2] < (influence @ prior)[2] - 0.01
    held = tikmix_d(influence, prior, solver=solver)
    assert (influence @ held.weights)[2] == pytest.approx((influence @ prior)[2], abs=1e-8)
    assert "pareto: 2" in held.active
    assert not any(each.startswith("pareto") for each in free.active)
    assert free.fun < held.fun


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 10), st.integers(2, 120))
def test_all_together_on_random_problems(paper, seed, n, m):
    """The prior is inside all bounds, so the problem is feasible."""
    rng = np.random.default_rng(seed)
    influence = rng.normal(size=(n, m)) + 0.3
    prior = rng.dirichlet(np.full(m, 2.0))
    floor = prior * rng.uniform(0, 0.9, size=m) * (rng.random(m) < 0.5)
    cap = np.minimum(prior * rng.uniform(1.1, 5, size=m), 1)
    tokens = 1e6 * prior * rng.uniform(1.1, 9, size=m)
    smoothing = rng.choice([0.0, 0.3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = tikmix_d(
            influence,
            prior,
            diversity=0.3,
            floor=floor,
            cap=cap,
            supply=tokens,
            stage_tokens=1e6,
            max_kl=0.1,
            smoothing=smoothing,
        )
    assert result.success, result.message
    weights = result.weights
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert (weights >= floor - 1e-12).all()
    assert (weights <= cap + 1e-12).all()
    assert (weights * 1e6 <= tokens * (1 + 1e-9)).all()
    assert divergence(weights, prior) <= 0.1 + 1e-9
    scaled = paper.scaled(influence)
    assert (scaled @ weights >= scaled @ prior - 1e-9).all()


# --- a prior outside the bounds


@SOLVERS
def test_prior_above_a_cap(solver):
    result = tikmix_d(MATRIX, PRIOR, solver=solver, cap={"web": 0.2}, pareto=False)
    assert result.success
    assert result.as_dict()["web"] == pytest.approx(0.2, abs=1e-9)
    result = tikmix_d(MATRIX, PRIOR, solver=solver, cap={"noise": 0.01})
    assert result.success
    assert result.as_dict()["noise"] <= 0.01 + 1e-12
    assert (INFLUENCE @ result.weights >= INFLUENCE @ P0 - 1e-9).all()


@SOLVERS
def test_kl_limit_with_a_prior_outside_the_bounds(solver):
    # The cap alone costs KL 0.1 * log(0.1 / 0.01) or so; a little more is feasible, and used up.
    least = divergence(np.r_[P0[:4] * 0.99 / 0.9, 0.01], P0)
    result = tikmix_d(MATRIX, PRIOR, solver=solver, cap={"noise": 0.01}, max_kl=least * 1.05, pareto=False)
    assert result.success
    assert divergence(result.weights, P0) == pytest.approx(least * 1.05, abs=2e-9)


# --- constraints that exclude each other are named


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap": 0.15}, r"^cap must sum to at least 1 over the domains; got 0\.75; raise cap$"),
        ({"floor": 0.25}, r"^floor must sum to at most 1 over the domains; got 1\.25; lower floor$"),
        ({"floor": {"code": 0.5}, "cap": {"code": 0.3}}, r"domain 'code': floor 0\.5 is above cap 0\.3"),
        (
            {"floor": {"code": 0.5}, "supply": dict.fromkeys(NAMES, 30.0), "stage_tokens": 100},
            r"domain 'code': floor 0\.5 is above supply 0\.3",
        ),
        (
            {"supply": dict.fromkeys(NAMES, 10.0), "stage_tokens": 100, "cap": {"code": 0.05}},
            r"^cap and supply must sum to at least 1 over the domains; got 0\.45; raise cap and supply$",
        ),
        ({"cap": {"web": 0.01, "books": 0.01}}, r"pareto=True cannot hold within cap: task\(s\) 'qa' would"),
        (
            {"cap": {"web": 0.01, "books": 0.01}, "floor": 0.01, "max_kl": 9.0},
            r"pareto=True cannot hold within floor and cap: task",
        ),
        (
            {"cap": {"web": 0.2}, "max_kl": 0.01, "pareto": False},
            r"max_kl=0\.01 cannot hold within cap: they alone force a KL",
        ),
        ({"cap": {"noise": 0.01}, "max_kl": 0.01}, r"max_kl=0\.01 cannot hold within cap and pareto=True: they alone"),
        (
            {"cap": {"web": 0.2}, "smoothing": 0.1, "pareto": False},
            r"smoothing must be 0 where .* got 0\.4 for domain 'web'",
        ),
    ],
)
def test_infeasible(options, message):
    with pytest.raises(ValueError, match=message):
        tikmix_d(MATRIX, PRIOR, **options)


def test_infeasible_floor_where_the_kl_limit_wants_zero():
    with pytest.raises(ValueError, match=r"domain 'maths': floor 0.01 is above max_kl \(zero where the prior is\) 0"):
        tikmix_d(MATRIX, PRIOR | {"maths": 0.0, "web": 0.5}, max_kl=0.2, floor=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cap": {"code": 0.1}},
            r"domain 'code' was never measured, so it keeps its prior weight 0\.2, .* above its cap 0\.1",
        ),
        ({"floor": {"code": 0.3}}, r"domain 'code' was never measured, .* below its floor 0\.3"),
        ({"floor": {"web": 0.85}}, r"floor, with the unmeasured domains at their prior weights, must sum to at most 1"),
    ],
)
def test_infeasible_with_an_unmeasured_domain(options, message):
    influence = INFLUENCE.copy()
    influence[:, 1] = np.nan
    with pytest.raises(ValueError, match=message):
        tikmix_d(InfluenceMatrix.from_values(influence, domains=NAMES), PRIOR, **options)


def test_the_named_tasks_are_enough_to_blame():
    """Without the tasks that the message names, the bounds are feasible."""
    influence = np.vstack([INFLUENCE, [0.0, 0.0, 1.0, 0.0, 0.0]])
    options = {"cap": np.r_[1, 1, 0.1, 1, 1], "diversity": 0.5}
    with pytest.raises(ValueError, match=r"task\(s\) 3 would fall below the prior by 0\.1 "):
        tikmix_d(influence, P0, **options)
    assert tikmix_d(INFLUENCE, P0, **options).success


def test_bounds_met_exactly():
    result = tikmix_d(MATRIX, PRIOR, cap=0.2, pareto=False)
    np.testing.assert_allclose(result.weights, 0.2, rtol=1e-12)
    result = tikmix_d(MATRIX, PRIOR, floor=P0 * (1 - 1e-9))
    np.testing.assert_allclose(result.weights, P0, atol=1e-8)
    assert result.success
