import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import softmax, xlogy

from tikmix_fast.mixture.direct.tilt import capped_tilt


def test_without_bounds_it_is_the_softmax():
    logits = np.random.default_rng(0).normal(size=40) * 5
    weights, free = capped_tilt(logits, np.zeros(40), np.ones(40))
    np.testing.assert_allclose(weights, softmax(logits), rtol=1e-13)
    assert free.all()


def test_it_minimises_what_it_says():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=8) * 2
    lower, upper = rng.uniform(0, 0.06, size=8), rng.uniform(0.15, 0.4, size=8)
    weights, _ = capped_tilt(logits, lower, upper)
    found = minimize(
        lambda w: xlogy(w, w).sum() - logits @ w,
        np.full(8, 1 / 8),
        method="SLSQP",
        bounds=np.column_stack([lower, upper]),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14},
    )
    assert found.success
    np.testing.assert_allclose(weights, found.x, atol=1e-6)
    assert xlogy(weights, weights).sum() - logits @ weights <= found.fun + 1e-12


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.sampled_from([0.1, 3.0, 1000.0]))
def test_optimality_conditions(seed, m, spread):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=m) * spread
    centre = rng.dirichlet(np.full(m, rng.choice([0.1, 1.0, 30.0])))
    # Bounds around some mixture are feasible; a third of the domains are pinned.
    slack = rng.uniform(0, 1, size=m) * (rng.random(m) > 1 / 3)
    lower, upper = np.maximum(centre - slack * rng.uniform(0, 0.3), 0), np.minimum(centre + slack, 1)
    weights, free = capped_tilt(logits, lower, upper)

    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert (weights >= lower).all()
    assert (weights <= upper).all()
    # One nu for all free weights; above it only what is capped, below it only what is held up.
    if free.any():
        level = logits[free] - np.log(np.maximum(weights[free], 1e-300))
        sure = weights[free] > 1e-280
        if sure.any():
            nu = level[sure].mean()
            np.testing.assert_allclose(level[sure], nu, atol=1e-9 * max(1, spread))
            unbounded = np.exp(np.minimum(logits - nu, 700))
            held = ~free & (lower < upper)
            capped = held & (weights == upper)
            assert (unbounded[capped] >= upper[capped] * (1 - 1e-9)).all()
            assert (unbounded[held & ~capped] <= lower[held & ~capped] * (1 + 1e-9)).all()


def test_large_logits_capped_leave_the_rest_finite():
    weights, _ = capped_tilt(np.array([5000.0, 0.0, 0.0]), np.zeros(3), np.array([0.4, 1.0, 1.0]))
    np.testing.assert_allclose(weights, [0.4, 0.3, 0.3], rtol=1e-14)


def test_one_domain():
    weights, _ = capped_tilt(np.array([3.0]), np.zeros(1), np.ones(1))
    assert weights.tolist() == [1.0]
