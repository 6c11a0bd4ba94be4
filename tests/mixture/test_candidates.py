import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.matrix.microbatch_record import MicrobatchRecord
from tikmix_fast.mixture.surrogate.candidates import dirichlet, draw_mixtures
from tikmix_fast.mixture.surrogate.labels import linear_labels, resampled_labels

ANCHOR = np.array([0.4, 0.3, 0.2, 0.1])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(1, 8),
    kind=st.sampled_from(["lhs", "log_uniform", "dirichlet"]),
    low=st.floats(0.1, 0.9),
    high=st.floats(1.2, 5.0),
)
def test_mixtures_lie_on_the_simplex_and_in_the_box(seed, m, kind, low, high):
    anchor = np.random.default_rng(seed).dirichlet(np.ones(m))
    mixtures = draw_mixtures(anchor, 20, kind, low=low, high=high, seed=seed)
    assert mixtures.shape == (20, m)
    np.testing.assert_allclose(mixtures.sum(axis=1), 1.0, atol=1e-12)
    if kind == "dirichlet":
        assert (mixtures >= 0).all()
    else:
        assert (mixtures >= low * anchor - 1e-12).all()
        assert (mixtures <= high * anchor + 1e-12).all()


@pytest.mark.parametrize("kind", ["lhs", "log_uniform", "dirichlet"])
def test_the_seed_decides_the_mixtures(kind):
    np.testing.assert_array_equal(draw_mixtures(ANCHOR, 9, kind, seed=3), draw_mixtures(ANCHOR, 9, kind, seed=3))
    assert (draw_mixtures(ANCHOR, 9, kind, seed=3) != draw_mixtures(ANCHOR, 9, kind, seed=4)).any()


def test_latin_hypercube_has_one_point_in_every_stratum_before_scaling():
    # Two domains of equal anchor: x / (x + y) cannot leave the box [1 / 3, 3], so that all 64 first draws are kept.
    low, high = 1 / 3, 3.0
    mixtures = draw_mixtures([0.5, 0.5], 64, "lhs", low=low, high=high, seed=5)
    from scipy.stats import qmc

    raw = qmc.LatinHypercube(2, seed=np.random.default_rng(5)).random(64) * (high - low) / 2 + low / 2
    expected = raw / raw.sum(axis=1, keepdims=True)
    inside = ((expected >= low / 2) & (expected <= high / 2)).all(axis=1)
    np.testing.assert_allclose(mixtures[: inside.sum()], expected[inside], atol=1e-15)
    strata = np.floor((raw - low / 2) / ((high - low) / 2) * 64).astype(int)
    for j in range(2):
        assert sorted(strata[:, j]) == list(range(64))


def test_dirichlet_has_its_mean_and_variance():
    strength = 30.0
    mixtures = draw_mixtures(ANCHOR, 200_000, "dirichlet", concentration=strength)
    error = np.sqrt(ANCHOR * (1 - ANCHOR) / (strength + 1) / 200_000)
    assert (np.abs(mixtures.mean(axis=0) - ANCHOR) < 5 * error).all()
    np.testing.assert_allclose(mixtures.var(axis=0), ANCHOR * (1 - ANCHOR) / (strength + 1), rtol=0.03)


def test_a_domain_at_zero_stays_there():
    for kind in ("lhs", "log_uniform", "dirichlet"):
        assert (draw_mixtures([0.5, 0.0, 0.5], 30, kind)[:, 1] == 0).all()


def test_tiny_strengths_still_give_mixtures():
    mixtures = dirichlet(np.random.default_rng(0), np.array([3e-5, 1e-5]), 4000)
    np.testing.assert_allclose(mixtures.sum(axis=1), 1.0)
    assert 0.72 < (mixtures[:, 0] > 0.5).mean() < 0.78


def test_an_anchor_may_be_given_by_name():
    by_name = draw_mixtures({"b": 0.7, "a": 0.3}, 5, domains=("a", "b"))
    np.testing.assert_array_equal(by_name, draw_mixtures([0.3, 0.7], 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchor": [0.5, 0.6]}, "anchor must be at least 0 and sum to 1 within 1e-6; got sum 1.1"),
        ({"anchor": [1.5, -0.5]}, "anchor must be at least 0; got -0.5"),
        ({"count": 0}, "count must be an int of at least 1; got 0"),
        ({"kind": "sobol"}, "kind must be one of 'lhs', 'log_uniform', 'dirichlet'; got 'sobol'"),
        ({"concentration": 3.0}, 'concentration is for kind="dirichlet" only; got 3.0'),
        ({"kind": "dirichlet", "concentration": 0.0}, "concentration must be above 0"),
        ({"low": 1.1}, "low must be at least 0 and at most 1"),
        ({"kind": "log_uniform", "low": 0.0}, "low must be above 0"),
        ({"high": 0.9}, "high must be at least 1, so that the box contains the anchor; got 0.9"),
    ],
)
def test_messages(change, message):
    arguments = {"anchor": ANCHOR, "count": 4, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        draw_mixtures(**arguments)


def test_a_box_too_narrow_is_an_error_and_not_an_endless_loop():
    anchor = np.full(60, 1 / 60)
    with pytest.raises(
        ValueError, match=r"only \d+ of 1000 mixtures stayed in the box anchor \* \[0.99, 1.01\].*widen"
    ):
        draw_mixtures(anchor, 500, low=0.99, high=1.01, max_draws=1000)


# --- labels


def measured(blocks):
    """Make a matrix of one task from the scores and tokens of each domain's micro-batches."""
    record = MicrobatchRecord(1, len(blocks))
    for j, each in enumerate(blocks):
        for score, count in each:
            tokens, zero = np.zeros(len(blocks)), np.zeros((1, len(blocks)))
            tokens[j] = count
            sums = zero.copy()
            sums[0, j] = score * count
            record.add(sums, tokens, zero, zero)
    values = [[sum(s * c for s, c in each) / sum(c for _, c in each) if each else np.nan for each in blocks]]
    plain = InfluenceMatrix.from_values(values)
    return InfluenceMatrix(**{**vars(plain), "record": record})


def test_linear_labels_are_the_product_and_take_unmeasured_as_zero():
    labels = linear_labels([[2.0, np.nan, -1.0], [0.5, np.nan, 4.0]], [[0.2, 0.3, 0.5]])
    np.testing.assert_allclose(labels, [[-0.1, 2.1]])


def test_resampled_labels_scatter_around_the_linear_ones_by_the_micro_batches_spread():
    rng = np.random.default_rng(0)
    scores = [rng.normal(level, 0.3, size=40) for level in (1.0, -0.5)]
    matrix = measured([[(score, 8.0) for score in each] for each in scores])
    mixtures = np.tile([0.25, 0.75], (20_000, 1))
    labels = resampled_labels(matrix, mixtures, microbatches=50)[:, 0]
    expected = 0.25 * scores[0].mean() + 0.75 * scores[1].mean()
    mixed = np.concatenate([scores[0], np.repeat(scores[1], 3)])  # 1 : 3
    assert abs(labels.mean() - expected) < 5 * mixed.std() / np.sqrt(50 * 20_000)
    assert labels.std() == pytest.approx(mixed.std() / np.sqrt(50), rel=0.03)


def test_resampled_labels_weigh_domains_by_the_mixture_and_not_by_tokens():
    matrix = measured([[(1.0, 1000.0)] * 4, [(3.0, 1.0)] * 4])
    assert resampled_labels(matrix, [[0.5, 0.5]] * 2000).mean() == pytest.approx(2.0, abs=0.05)


def test_resampled_labels_follow_the_seed():
    matrix = measured([[(1.0, 2.0), (2.0, 3.0)], [(0.0, 1.0), (5.0, 4.0)]])
    mixtures = [[0.5, 0.5]] * 6
    first = resampled_labels(matrix, mixtures, seed=1)
    np.testing.assert_array_equal(first, resampled_labels(matrix, mixtures, seed=1))
    assert (first != resampled_labels(matrix, mixtures, seed=2)).any()


def test_messages_of_labels():
    matrix = measured([[(1.0, 2.0)], []])
    assert resampled_labels(matrix, [[1.0, 0.0]]).tolist() == [[1.0]]
    with pytest.raises(ValueError, match="domain 'domain1' has weight but was never measured; measure it"):
        resampled_labels(matrix, [[0.5, 0.5]])
    with pytest.raises(ValueError, match="microbatches must be an int of at least 1; got 0"):
        resampled_labels(matrix, [[1.0, 0.0]], microbatches=0)
    with pytest.raises(ValueError, match="matrix must have a record"):
        resampled_labels(InfluenceMatrix.from_values([[1.0]]), [[1.0]])
    with pytest.raises(TypeError, match="matrix must be an InfluenceMatrix; got list"):
        resampled_labels([[1.0]], [[1.0]])
    with pytest.raises(ValueError, match=r"mixtures must have shape \[N, 2\], one mixture a row; got \(1, 3\)"):
        linear_labels([[1.0, 2.0]], [[0.2, 0.3, 0.5]])
    with pytest.raises(ValueError, match=r"sum to 1 within 0\.01 in every row; got row 1 with sum 1\.1"):
        linear_labels([[1.0, 2.0]], [[0.5, 0.5], [0.6, 0.5]])
