"""The two solvers against each other, against closed forms, and against a proof of optimality of their own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, linprog, minimize

from tikmix_fast.mixture.direct import interior_point as interior
from tikmix_fast.mixture.direct import slsqp
from tikmix_fast.mixture.direct.problem import Problem, entropy, kl_divergence

SEEDS = st.integers(0, 2**32 - 1)


def make(influence, prior, paper, uniformity=1.0, diversity=1.0, lower=0.0, upper=1.0, pareto=True, max_kl=None):
    scaled = paper.scaled(np.asarray(influence, dtype=float))
    m = scaled.shape[1]
    return Problem(
        scaled=scaled,
        cost=-scaled.sum(axis=0),
        prior=np.asarray(prior, dtype=float),
        lower=np.full(m, float(lower)),
        upper=np.full(m, float(upper)),
        uniformity=uniformity,
        diversity=diversity,
        pareto=pareto,
        max_kl=max_kl,
    )


def draw(seed, n, m):
    """Draw a matrix of one of several kinds, and a prior."""
    rng = np.random.default_rng(seed)
    influence = rng.normal(size=(n, m))
    kind = seed % 4
    if kind == 1:
        influence = rng.integers(-2, 3, size=(n, m)).astype(float)
    elif kind == 2:
        influence = rng.normal(size=(n, 2)) @ rng.normal(size=(2, m)) * np.exp(3 * rng.normal(size=(n, 1)))
    elif kind == 3:
        influence = influence * 0.3 + 1
    return influence, rng.dirichlet(np.full(m, 3.0))


def slater(problem):
    """Return the most by which a mixture can beat the prior on every task, up to 1."""
    m = problem.shape[1]
    found = linprog(
        np.append(np.zeros(m), -1.0),
        A_ub=np.hstack([-problem.scaled[problem.contested], np.ones((problem.contested.sum(), 1))]),
        b_ub=-problem.required[problem.contested],
        A_eq=np.append(np.ones(m), 0.0)[None],
        b_eq=[1.0],
        bounds=[*zip(problem.lower, problem.upper, strict=True), (0.0, 1.0)],
    )
    return found.x[-1]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(SEEDS, st.integers(1, 64), st.integers(1, 512), st.sampled_from([1.0, 0.3, 0.03]))
def test_interior_point_is_optimal(paper, seed, n, m, diversity):
    influence, prior = draw(seed, n, m)
    problem = make(influence, prior, paper, diversity=diversity)
    found = interior.solve(problem)
    assert found.converged, found.message
    assert problem.violations(found.weights) == []
    assert found.gap <= 1e-8 * max(1, abs(problem.objective(found.weights)))
    assert problem.objective(found.weights) == pytest.approx(
        paper.objective(problem.scaled, found.weights, diversity=diversity), abs=1e-11
    )
    gain = problem.scaled @ found.weights
    if gain.std() > 1e-4 or n == 1:  # elsewhere the std has no gradient
        shortfall = paper.shortfall(problem.scaled, found.weights, prior, 0, 1, diversity=diversity)
        assert shortfall < 1e-6 * max(1, np.abs(problem.cost).max())


@settings(deadline=None, max_examples=40, derandomize=True)
@given(SEEDS, st.integers(1, 12), st.integers(2, 30), st.sampled_from([1.0, 0.2]), st.sampled_from([None, 0.05]))
def test_solvers_agree(paper, seed, n, m, diversity, max_kl):
    influence, prior = draw(seed, n, m)
    problem = make(influence, prior, paper, diversity=diversity, upper=max(0.3, prior.max()), max_kl=max_kl)
    ours = interior.solve(problem)
    assert ours.converged, ours.message
    assert problem.violations(ours.weights) == []
    theirs = slsqp.solve(problem)
    if theirs.converged and not problem.violations(theirs.weights):
        # Ours may use 1e-10 of Pareto, at prices that are the higher the less room Pareto leaves.
        # SLSQP stops about 1e-7 short of a kink.
        value, room = problem.objective(ours.weights), slater(problem)
        assert value <= problem.objective(theirs.weights) + 1e-8
        if room > 0.1 and (n == 1 or (problem.scaled @ ours.weights).std() > 1e-6):
            assert value == pytest.approx(problem.objective(theirs.weights), abs=1e-8 * max(1, abs(value)))


def test_a_task_that_all_domains_help_alike_constrains_nothing(paper):
    # As a constraint it stops SLSQP at a corner, from both starts and without a word.
    problem = make([[-2, -2], [-1, 2]], [0.70342461, 0.29657539], paper, upper=0.70342461)
    assert problem.contested.tolist() == [False, True]
    theirs, ours = slsqp.solve(problem), interior.solve(problem)
    assert theirs.converged
    assert problem.objective(theirs.weights) == pytest.approx(problem.objective(ours.weights), abs=1e-9)
    assert ours.weights[1] < 0.69


def test_slsqp_works_where_the_comparison_needs_it(paper):
    # The comparison above skips what SLSQP cannot do; on ordinary problems it may not.
    for seed in range(10):
        rng = np.random.default_rng(seed)
        problem = make(rng.normal(size=(5, 26)) * 0.5 + 0.5, rng.dirichlet(np.full(26, 5.0)), paper)
        theirs, ours = slsqp.solve(problem), interior.solve(problem)
        assert theirs.converged
        assert problem.violations(theirs.weights) == []
        assert problem.objective(theirs.weights) == pytest.approx(problem.objective(ours.weights), abs=1e-8)
        np.testing.assert_allclose(theirs.weights, ours.weights, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Values in x were outside bounds:RuntimeWarning")  # of scipy before 1.16
def test_kink_where_all_tasks_gain_the_same(paper):
    rng = np.random.default_rng(3)
    problem = make(rng.normal(size=(3, 20)) + 1, np.full(20, 1 / 20), paper, uniformity=10.0)
    found = interior.solve(problem)
    assert found.converged
    gain = problem.scaled @ found.weights
    assert gain.std() < 1e-9
    # The optimum on the plane of equal gains, by SLSQP with that as a constraint instead of the std.
    even = minimize(
        lambda w: problem.cost @ w + w @ np.log(np.maximum(w, 1e-300)),
        problem.prior,
        method="SLSQP",
        bounds=[(1e-9, 1)] * 20,
        constraints=[
            {"type": "eq", "fun": lambda w: w.sum() - 1},
            {"type": "eq", "fun": lambda w: np.diff(problem.scaled @ w)},
            {"type": "ineq", "fun": lambda w: problem.scaled @ w - problem.required},
        ],
        options={"ftol": 1e-13, "maxiter": 500},
    )
    assert even.success
    assert problem.objective(found.weights) == pytest.approx(even.fun, abs=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_kl_limit_closed_form(paper, seed):
    # Without std and Pareto: w ~ prior^(mu / (1 + mu)) exp(gain / (1 + mu)), with the mu that meets the limit.
    rng = np.random.default_rng(seed)
    prior = rng.dirichlet(np.full(30, 2.0))
    problem = make(rng.normal(size=(4, 30)) + 0.5, prior, paper, uniformity=0.0, pareto=False, max_kl=0.1)

    def mixture(mu):
        logits = (mu * np.log(prior) - problem.cost) / (1 + mu)
        return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()

    mu = brentq(lambda mu: kl_divergence(mixture(mu), prior) - 0.1, 0, 1e4, xtol=1e-13)
    assert mu > 0
    np.testing.assert_allclose(interior.solve(problem).weights, mixture(mu), atol=1e-8)
    np.testing.assert_allclose(slsqp.solve(problem).weights, mixture(mu), atol=1e-5)


def test_bounds_that_leave_one_mixture(paper):
    problem = make(np.eye(3), [0.2, 0.3, 0.5], paper, pareto=False, upper=1 / 3)
    found = interior.solve(problem)
    np.testing.assert_allclose(found.weights, 1 / 3, rtol=1e-15)


@pytest.mark.parametrize("seed", range(4))
def test_gap_bounds_the_true_distance(paper, seed):
    # Stopped early, the solver must not claim to be closer than it is.
    influence, prior = draw(3 + 4 * seed, 6, 40)
    problem = make(influence, prior, paper, diversity=0.2)
    best = problem.objective(interior.solve(problem).weights)
    for iterations in (1, 3, 6):
        early = interior._iterate(problem, iterations, cautious=False)
        if not problem.violations(early.weights):
            assert problem.objective(early.weights) - best <= early.gap + 1e-9
    assert not interior._iterate(problem, 1, cautious=False).converged


def test_entropy_and_divergence():
    weights, prior = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.5, 0.25])
    assert entropy(weights) == pytest.approx(np.log(2))
    assert kl_divergence(weights, prior) == pytest.approx(0.5 * np.log(2))
    assert kl_divergence(weights, np.array([1.0, 0.0, 0.0])) == np.inf
