import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import brentq, linprog
from scipy.special import softmax

import tikmix_fast
from tikmix_fast import InfluenceMatrix, tikmix_d
from tikmix_fast.mixture.direct import interior_point as interior
from tikmix_fast.mixture.direct import slsqp
from tikmix_fast.mixture.direct.problem import Solution

SEEDS = st.integers(0, 2**32 - 1)


def ordinary(seed, n, m):
    """Draw influence that is positive on average, as measured ones are, and a prior."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, m)) * 0.5 + 0.5, rng.dirichlet(np.full(m, 5.0))


def quiet(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tikmix_d(*arguments, **options)


# --- closed forms and optimality


@pytest.mark.parametrize(("solver", "accuracy"), [("auto", 1e-9), ("interior", 1e-9), ("slsqp", 1e-6)])
def test_softmax_closed_form(solver, accuracy):
    influence, prior = ordinary(0, 4, 26)
    result = tikmix_d(influence, prior, uniformity=0, diversity=0.7, pareto=False, solver=solver)
    expected = softmax((influence / influence.max(axis=1, keepdims=True)).sum(axis=0) / 0.7)
    np.testing.assert_allclose(result.weights, expected, atol=accuracy)


def test_pareto_that_is_slack_does_not_change_the_closed_form():
    rng = np.random.default_rng(0)
    influence = rng.normal(size=(1, 26)) * 0.1 + rng.normal(size=26) * 0.5 + 0.5 * np.ones((4, 1))
    result = tikmix_d(influence, np.full(26, 1 / 26), uniformity=0)
    expected = softmax((influence / influence.max(axis=1, keepdims=True)).sum(axis=0))
    assert result.active == ()
    np.testing.assert_allclose(result.weights, expected, atol=1e-9)


def test_capped_tilt_closed_form():
    influence, _ = ordinary(1, 3, 20)
    cap = 0.08
    result = tikmix_d(influence, np.full(20, 0.05), uniformity=0, diversity=0.5, pareto=False, cap=cap)
    logits = (influence / influence.max(axis=1, keepdims=True)).sum(axis=0) / 0.5
    nu = brentq(lambda nu: np.minimum(np.exp(logits - nu), cap).sum() - 1, -50, 50, xtol=1e-14)
    expected = np.minimum(np.exp(logits - nu), cap)
    assert (expected == cap).any()
    np.testing.assert_allclose(result.weights, expected, atol=1e-10)


@pytest.mark.parametrize("solver", ["slsqp", "interior"])
def test_reported_terms_are_the_papers(solver, paper):
    influence, prior = ordinary(2, 5, 12)
    result = tikmix_d(influence, prior, 2.0, 0.5, 0.3, solver=solver)
    scaled = paper.scaled(influence)
    assert result.fun == pytest.approx(paper.objective(scaled, result.weights, 2.0, 0.5, 0.3), abs=1e-13)
    assert result.fun == pytest.approx(
        2.0 * result.terms["uniformity"] - 0.5 * result.terms["influence"] - 0.3 * result.terms["diversity"]
    )
    assert result.terms["influence"] == pytest.approx((scaled @ result.weights).sum())
    assert result.effective_domains == pytest.approx(np.exp(-(result.weights * np.log(result.weights)).sum()))
    np.testing.assert_allclose(result.predicted, influence @ result.weights)
    np.testing.assert_allclose(result.predicted_prior, influence @ prior)
    assert result.solver == solver
    assert result.success
    assert result.status == 0
    assert paper.shortfall(scaled, result.weights, prior, 0, 1, 2.0, 0.5, 0.3) < 1e-5


@settings(deadline=None, max_examples=60, derandomize=True)
@given(SEEDS, st.integers(1, 64), st.integers(1, 512), st.sampled_from([1.0, 0.3, 0.05]))
def test_random_matrices(paper, seed, n, m, diversity):
    """Random signs, so that up to half of a row harms its task; the answer is feasible and optimal."""
    rng = np.random.default_rng(seed)
    influence = rng.normal(size=(n, m)) + rng.choice([0.0, 0.5])
    prior = rng.dirichlet(np.full(m, rng.choice([0.3, 3.0])))
    result = quiet(influence, prior, diversity=diversity)
    assert result.success, result.message
    assert result.weights.sum() == pytest.approx(1, abs=1e-12)
    assert (result.weights >= 0).all()
    scaled = paper.scaled(influence)
    assert (scaled @ result.weights >= scaled @ prior - 1e-9).all()
    proven = quiet(influence, prior, diversity=diversity, solver="interior")
    # Where the prior leaves little room, the 1e-10 by which Pareto is relaxed is worth thousands of times as much.
    assert result.fun == pytest.approx(proven.fun, abs=1e-6 * max(1, abs(proven.fun)))
    if n == 1 or (scaled @ proven.weights).std() > 1e-4:
        shortfall = paper.shortfall(scaled, proven.weights, prior, 0, 1, diversity=diversity)
        assert shortfall < 1e-6 * max(1, np.abs(scaled.sum(axis=0)).max())


@settings(deadline=None, max_examples=100)
@given(
    hnp.arrays(
        float,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=7),
        elements=st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, 1e-4, -1e-12, 1e6, 3.0, -7.0]) | st.floats(-5, 5),
    ),
    st.sampled_from(["auto", "interior"]),
)
@example(np.array([[1.0, 0.0, 1e-8], [-7.0, 0.0, 0.0]]), "interior")
def test_degenerate_matrices_never_give_an_unchecked_answer(paper, influence, solver):
    m = influence.shape[1]
    prior = np.arange(1, m + 1) / (m * (m + 1) / 2)
    result = quiet(influence, prior, solver=solver)
    scaled = paper.scaled(influence)
    assert result.weights.sum() == pytest.approx(1, abs=1e-12)
    assert (scaled @ result.weights >= scaled @ prior - 1e-9).all()
    if not result.success:
        np.testing.assert_array_equal(result.weights, prior / prior.sum())
        return
    value = paper.objective(scaled, result.weights)
    for target in [*np.eye(m), prior, np.full(m, 1 / m)]:
        for part in (1e-3, 0.1, 1.0):
            other = (1 - part) * result.weights + part * target
            if (scaled @ other >= scaled @ prior).all():
                assert paper.objective(scaled, other) >= value - 1e-7


@pytest.mark.parametrize("solver", ["slsqp", "interior"])
def test_one_optimum_from_any_start(solver):
    # Without Pareto the prior is only where SLSQP starts.
    influence, _ = ordinary(3, 4, 15)
    starts = [np.eye(15)[0], np.full(15, 1 / 15), *np.random.default_rng(0).dirichlet(np.full(15, 0.2), size=4)]
    results = [tikmix_d(influence, start, pareto=False, solver=solver) for start in starts]
    for result in results[1:]:
        assert result.fun == pytest.approx(results[0].fun, abs=1e-9)
        np.testing.assert_allclose(result.weights, results[0].weights, atol=1e-5)


@pytest.mark.parametrize("m", [100, 512])
def test_many_domains(paper, m):
    influence, prior = ordinary(m, 20, m)
    result = tikmix_d(influence, prior, diversity=0.3)
    assert result.solver == "interior"
    assert result.gap < 1e-8
    assert paper.shortfall(paper.scaled(influence), result.weights, prior, 0, 1, diversity=0.3) < 1e-6


# --- invariances


@pytest.mark.parametrize("solver", ["slsqp", "interior"])
def test_rescaling_a_task_changes_nothing(solver):
    influence, prior = ordinary(4, 5, 20)
    factors = np.array([1e-12, 1e9, 3.0, 1.0, 1e-3])[:, None]
    one, other = (tikmix_d(each, prior, solver=solver) for each in (influence, influence * factors))
    np.testing.assert_allclose(one.weights, other.weights, atol=1e-6)
    assert one.fun == pytest.approx(other.fun, abs=1e-9)


@pytest.mark.parametrize("solver", ["slsqp", "interior"])
def test_order_of_domains_and_tasks_does_not_matter(solver):
    influence, prior = ordinary(5, 5, 20)
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(5), rng.permutation(20)
    one = tikmix_d(influence, prior, solver=solver)
    other = tikmix_d(influence[rows][:, columns], prior[columns], solver=solver)
    np.testing.assert_allclose(one.weights[columns], other.weights, atol=1e-6)


def test_equal_domains_get_equal_weights():
    influence = np.array([[1.0, 1.0, 0.2], [0.5, 0.5, 0.1]])
    result = tikmix_d(influence, [0.6, 0.1, 0.3])
    assert result.weights[0] == pytest.approx(result.weights[1], abs=1e-6)


def test_less_diversity_means_fewer_domains():
    influence, prior = ordinary(6, 3, 20)
    effective = [tikmix_d(influence, prior, diversity=each).effective_domains for each in (3.0, 1.0, 0.3, 0.1)]
    assert effective == sorted(effective, reverse=True)
    assert effective[0] > 18
    assert effective[-1] < 6


# --- rows that break the paper's formula


def test_a_task_that_every_domain_harms_is_not_harmed_most():
    # Divided by its negative maximum this row would turn around, and the third domain would win.
    influence = np.array([[-1.0, -2.0, -6.0]])
    with pytest.warns(UserWarning, match="task 0: the row's max is -1 .* normalised by the latter"):
        result = tikmix_d(influence, np.full(3, 1 / 3), pareto=False, diversity=0.1)
    assert result.weights[0] > result.weights[1] > result.weights[2]
    assert result.predicted[0] > result.predicted_prior[0]
    assert any("normalised by" in each for each in result.warnings)


def test_a_tiny_maximum_does_not_drown_the_other_tasks():
    influence = np.array([[1.0, 0.2, -0.5, 0.1], [-1.0, 1e-6, -0.5, -0.2]])
    with pytest.warns(UserWarning, match="task 1"):
        result = tikmix_d(influence, np.full(4, 0.25), pareto=False)
    assert np.isfinite(result.fun)
    assert abs(result.terms["influence"]) < 2
    # By the paper's formula task 1 counts a million times as much, and takes all weight off what serves task 0.
    assert result.weights[0] > 0.05


def test_named_task_in_the_warning():
    matrix = InfluenceMatrix.from_values([[-1.0, -2.0]], tasks=["arc"], domains=["a", "b"])
    with pytest.warns(UserWarning, match="task 'arc'") as caught:
        tikmix_d(matrix, [0.5, 0.5])
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("norm", "scale"), [("max", 3.0), ("maxabs", 4.0), ("std", np.std([3.0, -4.0, 1.0]))])
def test_norms(norm, scale):
    influence = np.array([[3.0, -4.0, 1.0]])
    result = tikmix_d(influence, np.full(3, 1 / 3), norm=norm, pareto=False)
    np.testing.assert_allclose(result.weights, softmax(influence[0] / scale), atol=1e-12)


def test_constant_row_under_std():
    with pytest.warns(UserWarning, match="std"):
        result = tikmix_d([[2.0, 2.0], [1.0, 0.0]], [0.5, 0.5], norm="std")
    assert result.success


# --- small and empty cases


@pytest.mark.parametrize("solver", ["auto", "slsqp", "interior"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 2), (5, 2)])
def test_all_zero(shape, solver):
    m = shape[1]
    result = tikmix_d(np.zeros(shape), np.eye(m)[0], solver=solver)
    np.testing.assert_allclose(result.weights, 1 / m, atol=1e-6)


@pytest.mark.parametrize("solver", ["auto", "slsqp", "interior"])
def test_one_domain(solver):
    result = quiet([[1.0], [-2.0]], [1.0], solver=solver)
    assert result.weights.tolist() == [1.0]
    assert result.success


@pytest.mark.parametrize("solver", ["auto", "slsqp", "interior"])
def test_two_domains_one_task(solver):
    result = tikmix_d([[2.0, 1.0]], [0.5, 0.5], solver=solver)
    np.testing.assert_allclose(result.weights, softmax([1.0, 0.5]), atol=1e-6)


def test_prior_with_zeros_can_be_left():
    influence, _ = ordinary(7, 3, 10)
    prior = np.r_[np.zeros(8), 0.5, 0.5]
    for solver in ("slsqp", "interior"):
        result = tikmix_d(influence, prior, solver=solver)
        assert result.success
        assert (result.weights[:8] > 0).all()


def test_diversity_zero_is_the_linear_program():
    influence, prior = ordinary(8, 4, 30)
    scaled = influence / influence.max(axis=1, keepdims=True)
    best = linprog(
        -scaled.sum(axis=0), A_ub=-scaled, b_ub=-scaled @ prior, A_eq=np.ones((1, 30)), b_eq=[1], bounds=(0, 1)
    )
    with pytest.warns(UserWarning, match="diversity was raised to 1e-05"):
        result = tikmix_d(influence, prior, uniformity=0, diversity=0)
    assert best.fun - 1e-9 <= result.fun <= best.fun + 1e-5 * np.log(30)
    assert result.fun - best.fun <= result.gap + 1e-9
    assert result.effective_domains < 5
    with pytest.warns(UserWarning, match="diversity was raised"):
        larger = tikmix_d(influence, prior, uniformity=0, influence=100, diversity=0)
    np.testing.assert_allclose(larger.weights, result.weights, atol=1e-9)
    assert larger.gap == pytest.approx(100 * 1e-5 * np.log(30), rel=1e-3)


def test_objective_without_any_term():
    with pytest.raises(ValueError, match="must be above 0"):
        tikmix_d([[1.0, 2.0]], [0.5, 0.5], 0, 0, 0)


# --- domains never measured


@pytest.mark.parametrize("solver", ["slsqp", "interior"])
def test_unmeasured_domain_keeps_its_prior_weight(solver, paper):
    influence, prior = ordinary(9, 3, 8)
    influence[:, [2, 5]] = np.nan
    matrix = InfluenceMatrix.from_values(influence, domains=list("abcdefgh"))
    result = tikmix_d(matrix, dict(zip("abcdefgh", prior, strict=True)), solver=solver, floor={"a": 0.01})
    assert result.kept == ("c", "f")
    assert "never measured, at prior weight: c, f" in result.message
    np.testing.assert_allclose(result.weights[[2, 5]], prior[[2, 5]], atol=1e-15)
    # The rest is the optimum of the same problem with those two fixed at no influence.
    known = np.where(np.isnan(influence), 0, influence)
    scaled = known / np.nanmax(influence, axis=1, keepdims=True)
    lower, upper = np.zeros(8), np.ones(8)
    lower[0] = 0.01
    lower[[2, 5]] = upper[[2, 5]] = prior[[2, 5]]
    free = np.delete(np.arange(8), [2, 5])
    assert paper.shortfall(scaled, result.weights, prior, lower, upper) < 1e-5
    assert not np.allclose(result.weights[free], prior[free], atol=1e-3)
    np.testing.assert_allclose(result.predicted, known @ result.weights)


@pytest.mark.parametrize("solver", ["slsqp", "interior"])
def test_unmeasured_domain_gains_nothing_from_diversity(solver):
    result = tikmix_d([[np.nan, 0.1, -1.0, -1.0]], [0.01, 0.33, 0.33, 0.33], solver=solver, pareto=False)
    assert result.weights[0] == pytest.approx(0.01, abs=1e-15)
    assert result.weights[1] > 0.4


def test_nothing_measured_keeps_the_prior():
    result = tikmix_d(np.full((2, 3), np.nan), [0.2, 0.3, 0.5])
    np.testing.assert_allclose(result.weights, [0.2, 0.3, 0.5], atol=1e-15)
    assert result.kept == (0, 1, 2)
    assert result.success


@pytest.mark.parametrize("solver", ["slsqp", "interior"])
def test_one_domain_measured_has_nowhere_to_go(solver):
    result = tikmix_d([[np.nan, 1.0, np.nan], [np.nan, 0.5, np.nan]], [0.2, 0.3, 0.5], solver=solver)
    np.testing.assert_allclose(result.weights, [0.2, 0.3, 0.5], atol=1e-12)


# --- failing solvers


def failing(message="no luck"):
    return lambda problem: Solution(problem.prior.copy(), False, np.inf, 7, message)


def infeasible(problem):
    return Solution(np.eye(problem.shape[1])[int(np.argmin(problem.scaled[0]))], True, 0.0, 1, "surely right")


def test_other_solver_takes_over_silently_in_auto(monkeypatch):
    influence, prior = ordinary(10, 3, 8)
    expected = tikmix_d(influence, prior)
    monkeypatch.setattr(interior, "solve", failing("failed: for the test"))
    result = tikmix_d(influence, prior)
    assert result.success
    assert result.solver == "slsqp"
    assert "for the test" in result.message
    assert result.fun == pytest.approx(expected.fun, abs=1e-8)


def test_other_solver_takes_over_with_a_warning_when_one_was_asked_for(monkeypatch):
    influence, prior = ordinary(10, 3, 8)
    monkeypatch.setattr(interior, "solve", failing())
    with pytest.warns(UserWarning, match="solver='interior' failed, solved by 'slsqp' instead"):
        result = tikmix_d(influence, prior, solver="interior")
    assert result.solver == "slsqp"


@pytest.mark.parametrize("broken", [failing(), infeasible])
def test_prior_is_returned_when_no_solver_passes(monkeypatch, broken):
    influence, prior = ordinary(11, 3, 8)
    monkeypatch.setattr(slsqp, "solve", broken)
    monkeypatch.setattr(interior, "solve", broken)
    with pytest.warns(UserWarning, match="the prior is returned"):
        result = tikmix_d(influence, prior)
    assert not result.success
    assert result.status == 1
    assert result.solver == "none"
    assert np.isnan(result.gap)
    assert "the prior is returned" in result.message
    if broken is infeasible:
        assert "pareto: task" in result.message
    np.testing.assert_allclose(result.weights, prior, atol=1e-15)


def test_slsqp_is_not_tried_on_large_problems(monkeypatch):
    influence, prior = ordinary(12, 3, 200)
    monkeypatch.setattr(interior, "solve", failing())
    monkeypatch.setattr(slsqp, "solve", lambda problem: pytest.fail("SLSQP takes minutes here"))
    with pytest.warns(UserWarning, match="the prior is returned"):
        assert not tikmix_d(influence, prior).success


def test_slsqp_starts_that_disagree_are_not_trusted(monkeypatch):
    influence, prior = ordinary(13, 3, 8)
    true = slsqp._run

    def astray(problem, start, max_iterations):
        run = true(problem, start, max_iterations)
        if np.allclose(start, 1 / 8):
            run.x = prior.copy()
        return run

    monkeypatch.setattr(slsqp, "_run", astray)
    with pytest.warns(UserWarning, match="solver='slsqp' failed, solved by 'interior' instead"):
        result = tikmix_d(influence, prior, solver="slsqp")
    assert result.solver == "interior"
    assert "SLSQP from two starts disagrees by" in result.message


# --- the module


def test_what_the_import_costs():
    program = (
        "import sys, tikmix_fast\n"
        "assert 'scipy.optimize' not in sys.modules and 'torch' not in sys.modules\n"
        "assert tikmix_fast.tikmix_d([[1.0, 2.0]], [0.5, 0.5]).success\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_public_names():
    from tikmix_fast.mixture.direct.tikmix_d import tikmix_d as function
    from tikmix_fast.mixture.result import MixtureResult

    assert tikmix_fast.MixtureResult is MixtureResult
    assert tikmix_fast.tikmix_d is function
