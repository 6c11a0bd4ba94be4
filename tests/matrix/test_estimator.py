"""The ratio estimator and its two-sided standard error, against formulas written out and against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tikmix_fast.matrix.estimator import Estimator


def filled(n, m, owners, weights, batches):
    estimator = Estimator(n, m)
    estimator.begin_round(owners, weights)
    for products, tokens in batches:
        estimator.add(products, tokens)
    return estimator.matrix([f"t{i}" for i in range(n)], [f"d{j}" for j in range(m)])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), batches=st.integers(2, 8), splits=st.integers(2, 4))
def test_written_out(seed, batches, splits):
    random = np.random.default_rng(seed)
    n, m = 2, 3
    owners = np.repeat(np.arange(n), splits)
    weights = random.dirichlet(np.full(splits, 5.0), size=n).reshape(-1)
    tokens = random.integers(1, 50, size=(batches, m)).astype(float)
    per_token = random.normal(size=(batches, n * splits, m))
    matrix = filled(n, m, owners, weights, [(s * t, t) for s, t in zip(per_token, tokens, strict=True)])
    for i in range(n):
        mine = owners == i
        for j in range(m):
            s = (weights[mine, None] * per_token[:, mine, j].T).sum(0)  # combined query, by micro-batch
            t = tokens[:, j]
            value = (t * s).sum() / t.sum()
            assert matrix.values[i, j] == pytest.approx(value, rel=1e-9, abs=1e-12)
            domain = batches / (batches - 1) * ((t * (s - value)) ** 2).sum() / t.sum() ** 2
            by_split = (t[:, None] * per_token[:, mine, j]).sum(0) / t.sum()
            task = (weights[mine] * (by_split - value) ** 2).sum() / (splits - 1)
            # Both sides' noise is in both; it is what single splits have beyond their mean.
            w = weights[mine]

            def over_batches(a, t=t):
                return batches / (batches - 1) * ((a - a.sum() / t.sum() * t) ** 2).sum() / t.sum() ** 2

            single = sum(w[k] ** 2 * over_batches(t * per_token[:, mine, j][:, k]) for k in range(splits))
            both = (single - (w**2).sum() * over_batches(t * s)) / (1 - (w**2).sum())
            both = min(max(both, 0), domain, task)
            assert matrix.stderr_domain[i, j] == pytest.approx(np.sqrt(domain), rel=1e-6, abs=1e-9)
            assert matrix.stderr_task[i, j] == pytest.approx(np.sqrt(task), rel=1e-6, abs=1e-9)
            assert matrix.stderr[i, j] == pytest.approx(np.sqrt(domain + task - both), rel=1e-6, abs=1e-9)
            dof = (domain + task - both) ** 2 / (domain**2 / (batches - 1) + task**2 / (splits - 1))
            assert matrix.dof[i, j] == pytest.approx(dof, rel=1e-5)


def test_rounds_add_their_task_variances():
    random = np.random.default_rng(0)
    estimator = Estimator(1, 1)
    sums, variances = [], []
    for _ in range(3):
        estimator.begin_round([0, 0], [0.5, 0.5])
        products = random.normal(size=(2, 1))
        estimator.add(products, np.array([10.0]))
        estimator.add(products, np.array([10.0]))
        sums.append(2 * products.mean())
        variances.append(0.5 * ((2 * products - 2 * products.mean()) ** 2).sum())
    matrix = estimator.matrix(["t"], ["d"])
    assert matrix.values[0, 0] == pytest.approx(sum(sums) / 60)
    assert matrix.stderr_task[0, 0] == pytest.approx(np.sqrt(sum(variances)) / 60)


def test_too_little_is_unknown():
    one = filled(1, 3, [0, 0], [0.5, 0.5], [(np.ones((2, 3)), np.array([5.0, 5.0, 0.0]))])
    assert one.values[0, :2].tolist() == [0.2, 0.2]
    assert np.isnan(one.values[0, 2]), "never seen"
    assert np.isnan(one.stderr).all(), "one micro-batch has no spread"
    single = filled(1, 1, [0], [1.0], [(np.ones((1, 1)), np.array([5.0]))] * 2)
    assert single.stderr_domain[0, 0] == pytest.approx(0, abs=1e-8)
    assert np.isnan(single.stderr_task[0, 0])
    assert np.isnan(single.stderr[0, 0]), "without splits the task side is unknown, and so is the whole"


def simulate(batches, splits, repetitions, noise_task, noise_domain, sizes=None, seed=0):
    """Repeat a measurement of a known bilinear truth; return truth, values, standard errors and intervals' hits."""
    random = np.random.default_rng([seed, batches, splits])
    d = 30
    g_i, g_j = random.normal(size=d), random.normal(size=d)
    sizes = np.ones(splits) if sizes is None else np.asarray(sizes, dtype=float)
    values, errors, inside = [], [], 0
    for _ in range(repetitions):
        queries = g_i + noise_task * random.normal(size=(splits, d)) / np.sqrt(sizes)[:, None]
        domain = g_j + noise_domain * random.normal(size=(batches, d))
        tokens = random.integers(20, 60, size=batches).astype(float)
        pairs = [(queries @ g[:, None] * t, np.array([t])) for g, t in zip(domain, tokens, strict=True)]
        matrix = filled(1, 1, [0] * splits, sizes / sizes.sum(), pairs)
        low, high = matrix.interval(0.95)
        inside += bool(low[0, 0] <= g_i @ g_j <= high[0, 0])
        values.append(matrix.values[0, 0])
        errors.append(matrix.stderr[0, 0])
    return g_i @ g_j, np.array(values), np.array(errors), inside / repetitions


@pytest.mark.parametrize(
    ("batches", "splits", "noise_task", "noise_domain"),
    [(12, 6, 0.0, 3.0), (12, 6, 3.0, 0.0), (12, 6, 3.0, 3.0), (8, 4, 4.0, 4.0), (16, 3, 1.0, 1.0)],
)
def test_stderr_is_the_spread_of_repeated_measurements(batches, splits, noise_task, noise_domain):
    _, values, errors, inside = simulate(batches, splits, 2000, noise_task, noise_domain)
    # The standard deviation of 2000 repetitions is known to 2%; the rest is the ratio estimator's and the clipping's
    # bias.
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.12)
    assert 0.92 <= inside <= 0.99  # t quantiles of few degrees of freedom are wide


def test_splits_of_different_sizes():
    _, values, errors, _ = simulate(12, 2, 3000, 3.0, 0.3, sizes=[2, 1])
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.1)


def test_state_round_trip_is_exact():
    random = np.random.default_rng(3)
    estimator = Estimator(2, 2)
    estimator.begin_round([0, 0, 1, 1], [0.5] * 4)
    for _ in range(3):
        estimator.add(random.normal(size=(4, 2)), np.array([3.0, 7.0]))
    other = Estimator(2, 2)
    other.load_state_dict(estimator.state_dict())
    for name in ("values", "stderr", "dof", "tokens"):
        ours, theirs = (getattr(each.matrix("ab", "xy"), name) for each in (estimator, other))
        assert (ours == theirs).all(), name


def test_products_need_queries():
    with pytest.raises(RuntimeError, match="begin a round"):
        Estimator(1, 1).add(np.zeros((1, 1)), np.ones(1))
