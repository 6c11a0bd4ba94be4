"""Intervals that hold the truth as often as they say, split halves, heavy tails, and the record behind them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from scipy.stats import t as student

from tikmix_fast import InfluenceMatrix
from tikmix_fast.matrix.estimator import Estimator
from tikmix_fast.matrix.microbatch_record import MicrobatchRecord

REPETITIONS = 2000


def draw(random, kind, *shape):
    """Return noise of mean 0 and variance 1."""
    if kind == "t3":
        return random.standard_t(3, size=shape) / np.sqrt(3)
    if kind == "lognormal":
        return (random.lognormal(size=shape) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)
    return random.normal(size=shape)


def measured(batches, splits, task, domain, kind="normal", unequal=False, dimension=8, skewed=False, seed=0):
    """Measure a known truth, every column a repetition with gradients of its own; return truth and matrix."""
    random, count = np.random.default_rng(seed), REPETITIONS
    of_task, of_domain = random.normal(size=(2, count, dimension))
    if skewed:
        of_task = np.ones((count, dimension))
    queries = of_task[:, None] + task * draw(random, kind, count, splits, dimension)
    estimator = Estimator(1, count)
    estimator.begin_round([0] * splits, [1 / splits] * splits)
    for _ in range(batches):
        tokens = np.round(50 * random.lognormal(0, 0.7, size=count) + 1) if unequal else np.full(count, 50.0)
        gradients = of_domain + domain * np.sqrt(50 / tokens)[:, None] * draw(random, kind, count, dimension)
        estimator.add(np.einsum("rqd,rd->qr", queries, gradients) * tokens, tokens)
    return (of_task * of_domain).sum(1), estimator.matrix(["t"], [f"d{k}" for k in range(count)])


def coverage(truth, interval):
    low, high = interval
    return ((low[0] <= truth) & (truth <= high[0])).mean()


# The coverage of 2000 repetitions is known to about half a percent.
@pytest.mark.parametrize(
    ("design", "least", "most"),
    [
        ({"batches": 12, "splits": 6, "task": 0.0, "domain": 3.0}, 0.935, 0.965),
        ({"batches": 12, "splits": 6, "task": 2.0, "domain": 2.0}, 0.935, 0.98),
        ({"batches": 16, "splits": 2, "task": 1.0, "domain": 3.0}, 0.935, 0.98),
        ({"batches": 16, "splits": 8, "task": 1.0, "domain": 3.0, "kind": "t3"}, 0.935, 0.975),
        ({"batches": 16, "splits": 8, "task": 0.2, "domain": 3.0, "kind": "lognormal"}, 0.92, 0.965),
        ({"batches": 12, "splits": 6, "task": 1.0, "domain": 3.0, "unequal": True}, 0.935, 0.975),
        ({"batches": 24, "splits": 6, "task": 1.0, "domain": 3.0, "unequal": True, "kind": "lognormal"}, 0.93, 0.975),
    ],
)
def test_coverage_of_the_t_interval(design, least, most):
    truth, matrix = measured(**design)
    assert least <= coverage(truth, matrix.interval(0.95)) <= most


@pytest.mark.parametrize("batches", [12, 40])
def test_bootstrap_covers_skewed_scores_better(batches):
    truth, matrix = measured(batches, 4, 0.1, 3.0, kind="lognormal", dimension=1, skewed=True)
    of_t = coverage(truth, matrix.interval())
    of_bootstrap = coverage(truth, matrix.interval(method="bootstrap", resamples=500))
    assert of_t < 0.93, "the case is meant to be hard"
    assert of_bootstrap > of_t + 0.02


def test_bootstrap_of_normal_scores_is_the_t_interval_nearly():
    truth, matrix = measured(40, 6, 1.0, 2.0)
    assert 0.935 <= coverage(truth, matrix.interval(method="bootstrap", resamples=500)) <= 0.975
    (low, high), (other_low, other_high) = matrix.interval(), matrix.interval(method="bootstrap", resamples=500)
    assert np.median((other_high - other_low) / (high - low)) == pytest.approx(1, abs=0.06)


def small(batches=10, n=2, m=4, splits=2, seed=0, signal=1.0, noise=0.5, kind="normal"):
    random = np.random.default_rng(seed)
    truth = signal * random.normal(size=(n, m))
    estimator = Estimator(n, m)
    estimator.begin_round(np.repeat(np.arange(n), splits), [1 / splits] * (n * splits))
    of_split = noise * random.normal(size=(n * splits, m))
    for _ in range(batches):
        tokens = random.integers(5, 60, size=m).astype(float)
        of_batch = noise * np.sqrt(20 / tokens) * draw(random, kind, n * splits, m)
        scores = np.repeat(truth, splits, axis=0) + of_split + of_batch
        estimator.add(scores * tokens, tokens)
    return estimator, estimator.matrix([f"t{i}" for i in range(n)], [f"d{j}" for j in range(m)])


def test_bootstrap_is_repeatable_and_falls_back():
    _, matrix = small()
    one, two = (matrix.interval(method="bootstrap", seed=3) for _ in range(2))
    assert (one[0] == two[0]).all()
    assert (one[1] == two[1]).all()
    assert (one[0] < matrix.values).all()
    assert (matrix.values < one[1]).all()
    _, few = small(batches=7)
    for ours, theirs in zip(few.interval(method="bootstrap"), few.interval(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_bootstrap_of_scores_without_spread():
    estimator = Estimator(1, 1)
    estimator.begin_round([0, 0], [0.5, 0.5])
    for _ in range(10):
        estimator.add(np.full((2, 1), 8.0), np.array([4.0]))
    low, high = estimator.matrix(["t"], ["d"]).interval(method="bootstrap")
    assert low[0, 0] == pytest.approx(2.0, abs=1e-6)
    assert high[0, 0] == pytest.approx(2.0, abs=1e-6)


def test_effective_microbatches():
    estimator = Estimator(1, 3)
    estimator.begin_round([0, 0], [0.5, 0.5])
    for tokens in ([10.0, 10.0, 0.0], [10.0, 1.0, 0.0], [10.0, 1.0, 0.0]):
        estimator.add(np.ones((2, 3)), np.array(tokens))
    effective = estimator.matrix(["t"], ["a", "b", "c"]).effective_microbatches
    np.testing.assert_allclose(effective, [3, 12**2 / 102, 0])


# --- halves


def test_halves_share_nothing():
    # The second half of the task's batches says the opposite of the first, and so do the halves.
    estimator = Estimator(2, 5)
    estimator.begin_round([0, 0, 1, 1], [0.5] * 4)
    for _ in range(6):
        estimator.add(np.outer([1.0, -1.0, 1.0, 1.0], np.arange(5.0)) * 10, np.full(5, 10.0))
    agreement = estimator.matrix("ab", "vwxyz").split_half()
    np.testing.assert_allclose(agreement.half, [-1, 1])
    np.testing.assert_allclose(agreement.whole, [-1, 1])


def test_split_half_predicts_the_agreement_of_whole_measurements():
    predicted, seen = [], []
    for seed in range(25):
        random = np.random.default_rng(seed)
        truth = random.normal(size=12)
        matrices = []
        for _ in range(2):
            estimator = Estimator(1, 12)
            estimator.begin_round([0] * 4, [0.25] * 4)
            of_split = random.normal(size=(4, 12))
            for _ in range(8):
                scores = truth + of_split + 2 * random.normal(size=12)
                estimator.add(scores * 20, np.full(12, 20.0))
            matrices.append(estimator.matrix(["t"], [f"d{j}" for j in range(12)]))
        predicted.append(matrices[0].split_half(draws=20).whole[0])
        seen.append(spearmanr(matrices[0].values[0], matrices[1].values[0]).statistic)
    # Mean of 25 with a standard deviation of about 0.15 each.
    assert np.mean(predicted) == pytest.approx(np.mean(seen), abs=0.09)
    assert 0.3 < np.mean(seen) < 0.9


def test_what_has_no_halves_is_unknown():
    _, matrix = small(splits=1)
    assert np.isnan(matrix.split_half().half).all(), "the task's batches are in one split"
    _, matrix = small(m=2)
    assert np.isnan(matrix.split_half().whole).all(), "two domains have no order worth the name"
    _, matrix = small(batches=1)
    assert np.isnan(matrix.split_half().half).all()


# --- tails


def test_normal_scores_raise_no_alarm():
    alarms = [small(batches=12, n=3, m=5, seed=seed)[1].tails().heavy.any() for seed in range(200)]
    assert np.mean(alarms) < 0.1, "one in 20 is promised"


def test_one_micro_batch_that_decides():
    random = np.random.default_rng(0)
    scores, tokens = random.normal(1.0, 0.1, size=20), random.integers(10, 100, size=20).astype(float)
    scores[7] = 30.0
    estimator = Estimator(1, 2)
    estimator.begin_round([0, 0], [0.5, 0.5])
    for score, count in zip(scores, tokens, strict=True):
        estimator.add(np.array([[score * count, random.normal(1, 0.1) * count]] * 2), np.array([count, count]))
    matrix = estimator.matrix(["qa"], ["web", "code"])
    tails = matrix.tails()
    assert tails.heavy.tolist() == [[True, False]]
    assert tails.largest_share[0, 0] > 0.95
    assert matrix.values[0, 0] > 1.5
    assert tails.winsorised[0, 0] == pytest.approx(1.0, abs=0.35)
    assert tails.winsorised[0, 1] == pytest.approx(matrix.values[0, 1], abs=0.05)
    assert "heavy tails: 1 of 2 cells" in tails.message
    assert "qa x web: one micro-batch makes 100%" in tails.message
    assert f"winsorised {tails.winsorised[0, 0]:.3g}" in tails.message


def test_equal_micro_batches_are_tested_as_grubbs_does():
    random = np.random.default_rng(1)
    scores = random.normal(size=9)
    estimator = Estimator(1, 1)
    estimator.begin_round([0], [1.0])
    for score in scores:
        estimator.add(np.array([[score * 5]]), np.array([5.0]))
    share = estimator.matrix(["t"], ["d"]).tails().largest_share[0, 0]
    grubbs = np.abs(scores - scores.mean()).max() / scores.std(ddof=1)
    # Grubbs' statistic is sqrt(share) (k - 1) / sqrt(k), and its critical value follows from Student's t.
    assert np.sqrt(share) * 8 / 3 == pytest.approx(grubbs)
    critical = student.isf(0.05 / (2 * 9), 7)
    limit = 8 / 3 * np.sqrt(critical**2 / (7 + critical**2))
    for factor, heavy in ((0.999, False), (1.001, True)):
        chance = 9 * 2 * student.sf(np.sqrt(7 * (factor * limit * 3 / 8) ** 2 / (1 - (factor * limit * 3 / 8) ** 2)), 7)
        assert (chance < 0.05) == heavy


def test_a_quiet_matrix_has_no_message():
    _, matrix = small(batches=2)
    tails = matrix.tails()
    assert np.isnan(tails.largest_share).all()
    assert np.isnan(tails.winsorised).all()
    assert tails.message == ""


# --- the record


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.sampled_from([2, 4, 8]), st.integers(0, 1000))
def test_a_full_record_merges_neighbours_and_loses_nothing(batches, blocks, seed):
    random = np.random.default_rng(seed)
    record = MicrobatchRecord(2, 2, blocks)
    tokens = random.integers(0, 3, size=(batches, 2)).astype(float)
    sums, first, first_tokens = random.normal(size=(3, batches, 2, 2)) * (tokens > 0)[:, None]
    for b in range(batches):
        record.add(sums[b], tokens[b], first[b], first_tokens[b])
    for j in range(2):
        seen = np.flatnonzero(tokens[:, j])
        size = 1
        while size * blocks < len(seen):
            size *= 2
        parts = [seen[k : k + size] for k in range(0, len(seen), size)]
        of_tokens, of_sums = record.of_domain(j)
        np.testing.assert_allclose(of_tokens, [tokens[part, j].sum() for part in parts])
        np.testing.assert_allclose(of_sums.T, [sums[part, :, j].sum(0) for part in parts] or np.zeros((0, 2)))
        (one, one_tokens), (two, two_tokens) = record.halves_of_domain(j)
        np.testing.assert_allclose(one.T, [first[part, :, j].sum(0) for part in parts] or np.zeros((0, 2)))
        np.testing.assert_allclose(one + two, of_sums, atol=1e-12)
        np.testing.assert_allclose(one_tokens + two_tokens, np.broadcast_to(of_tokens, (2, len(parts))), atol=1e-12)
    other = MicrobatchRecord.from_dict(json.loads(json.dumps(record.to_dict())), 2, 2)
    assert other.to_dict() == record.to_dict()


def test_blocks_of_a_long_measurement_say_what_micro_batches_do():
    estimator, matrix = small(batches=200, m=3)
    for j in range(3):
        tokens, sums = matrix.record.of_domain(j)
        assert len(tokens) == 50
        np.testing.assert_allclose(sums.sum(1) / tokens.sum(), matrix.values[:, j])
    (low, high), (other_low, other_high) = matrix.interval(), matrix.interval(method="bootstrap")
    # 50 blocks know a spread to a tenth.
    np.testing.assert_allclose(other_high - other_low, high - low, rtol=0.25)
    before = matrix.record.to_dict()
    estimator.add(np.ones((4, 3)), np.ones(3))
    assert matrix.record.to_dict() == before, "a matrix does not change"


def test_state_goes_on_as_if_uninterrupted():
    estimator, _ = small(batches=70)
    resumed = Estimator(2, 4)
    resumed.load_state_dict(json.loads(json.dumps(estimator.state_dict())))
    for each in (estimator, resumed):
        random = np.random.default_rng(9)
        each.begin_round([0, 0, 1, 1], [0.5] * 4)
        for _ in range(60):
            each.add(random.normal(size=(4, 4)), np.full(4, 3.0))
    ours, theirs = (each.matrix("ab", "wxyz") for each in (estimator, resumed))
    for one, two in zip(ours.interval(method="bootstrap"), theirs.interval(method="bootstrap"), strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(ours.split_half().half, theirs.split_half().half)


def test_a_matrix_of_plain_values_has_no_record():
    matrix = InfluenceMatrix.from_values([[1.0, 2.0]], stderr=[[0.1, 0.1]])
    for method in (matrix.tails, matrix.split_half, lambda: matrix.interval(method="bootstrap")):
        with pytest.raises(ValueError, match="no record of its micro-batches"):
            method()


@pytest.mark.parametrize(
    "spoil",
    [
        {"record": None},
        {"record": 3},
        {"record": {}},
        {"record": {"blocks": 3, "size": [1] * 4, "seen": [0] * 4, "table": [[]] * 4}},
        {"record": {"blocks": 4, "size": [1] * 3, "seen": [0] * 3, "table": [[]] * 3}},
        {"record": {"blocks": 4, "size": [1] * 4, "seen": [5] * 4, "table": [[]] * 4}},
        {"record": {"blocks": 4, "size": [1] * 4, "seen": [1] * 4, "table": [[]] * 4}},
        {"record": {"blocks": 4, "size": [1] * 4, "seen": [1] * 4, "table": [[[1.0] * 6]] * 4}},
        {"record": {"blocks": 4, "size": [1] * 4, "seen": [1] * 4, "table": [[[float("nan")] * 7]] * 4}},
        {"surprise": 1},
    ],
)
def test_a_spoiled_state_changes_nothing(spoil):
    estimator, _ = small()
    before = estimator.state_dict()
    with pytest.raises(ValueError, match=r"record|blocks|state"):
        estimator.load_state_dict({**before, **spoil})
    assert estimator.state_dict() == before


def test_matrix_keeps_its_record_on_disk(tmp_path):
    _, matrix = small(batches=9)
    loaded = InfluenceMatrix.load(matrix.save(tmp_path / "S.json"))
    np.testing.assert_array_equal(loaded.effective_microbatches, matrix.effective_microbatches)
    assert loaded.record.to_dict() == matrix.record.to_dict()
    np.testing.assert_array_equal(loaded.interval(method="bootstrap")[0], matrix.interval(method="bootstrap")[0])


def test_a_record_of_another_shape_is_refused():
    _, matrix = small()
    with pytest.raises(ValueError, match=r"record must be of \(2, 4\) tasks and domains; got \(3, 4\)"):
        InfluenceMatrix(**{**vars(matrix), "record": MicrobatchRecord(3, 4)})
    with pytest.raises(ValueError, match="effective_microbatches must be an array"):
        InfluenceMatrix(**{**vars(matrix), "effective_microbatches": np.ones(3)})
    with pytest.raises(ValueError, match="blocks must be even"):
        MicrobatchRecord(1, 1, 5)
