"""Weights that fade: the estimator and its record against formulas written out, and against simulation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tikmix_fast import InfluenceMatrix
from tikmix_fast.matrix.estimator import Estimator
from tikmix_fast.matrix.microbatch_record import MicrobatchRecord


def run_rounds(estimator, rounds, factor, owners=(0, 0, 1, 1)):
    """Feed rounds of (products [b, q, m], tokens [b, m]), each fading by ``factor`` before the next one."""
    for products, tokens in rounds:
        estimator.forget(factor)
        estimator.begin_round(owners, [0.5] * len(owners))
        for each in zip(products, tokens, strict=True):
            estimator.add(*each)


def draw_rounds(random, rounds, batches, m=3, queries=4):
    return [
        (random.normal(size=(batches, queries, m)) + 0.3, random.integers(1, 30, size=(batches, m)).astype(float))
        for _ in range(rounds)
    ]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), rounds=st.integers(2, 6), batches=st.integers(1, 3), factor=st.floats(0.3, 1.0))
def test_fading_written_out(seed, rounds, batches, factor):
    fed = draw_rounds(np.random.default_rng(seed), rounds, batches)
    estimator = Estimator(2, 3)
    run_rounds(estimator, fed, factor)
    matrix = estimator.matrix("ab", "xyz")
    f = np.repeat(factor ** np.arange(rounds - 1, -1, -1), batches)  # weight of every micro-batch
    for i in range(2):
        for j in range(3):
            a = np.concatenate([p[:, 2 * i : 2 * i + 2, j].mean(1) for p, _ in fed])
            t = np.concatenate([tokens[:, j] for _, tokens in fed])
            value = (f * a).sum() / (f * t).sum()
            assert matrix.values[i, j] == pytest.approx(value, rel=1e-9)
            assert matrix.tokens[j] == pytest.approx((f * t).sum())
            assert matrix.effective_microbatches[j] == pytest.approx((f * t).sum() ** 2 / ((f * t) ** 2).sum())
            if batches == 1:
                # Every micro-batch has queries of its own: the spread over them is the variance of both sides.
                p1, p2, p3 = f.sum(), (f**2).sum(), (f**3).sum()
                kept = 1 - 2 * p3 / (p1 * p2) + p2 / p1**2
                spread = ((f * (a - value * t)) ** 2).sum() / kept / (f * t).sum() ** 2
                splits = np.concatenate([p[:, 2 * i : 2 * i + 2, j] for p, _ in fed])
                of_task = ((f**2) * ((splits[:, 0] - splits[:, 1]) ** 2) / 4).sum() / (f * t).sum() ** 2
                assert matrix.stderr_task[i, j] == pytest.approx(np.sqrt(of_task))
                domain = max(spread - of_task, 0)
                assert matrix.stderr_domain[i, j] == pytest.approx(np.sqrt(domain), abs=1e-7)
                assert matrix.stderr[i, j] == pytest.approx(np.sqrt(spread), rel=1e-6)
                assert matrix.dof[i, j] == pytest.approx((f**2).sum() ** 2 / (f**4).sum() - 1)
    assert matrix.microbatches.tolist() == [rounds * batches] * 3, "what was seen is not forgotten"


def test_factor_one_forgets_nothing():
    fed = draw_rounds(np.random.default_rng(1), 3, 2)
    estimator, plain = Estimator(2, 3), Estimator(2, 3)
    run_rounds(estimator, fed, 1.0)
    for products, tokens in fed:
        plain.begin_round([0, 0, 1, 1], [0.5] * 4)
        for each in zip(products, tokens, strict=True):
            plain.add(*each)
    assert estimator.state_dict() == plain.state_dict()
    with pytest.raises(ValueError, match="between 0 and 1"):
        estimator.forget(1.1)
    estimator.forget(0.0)
    assert np.isnan(estimator.matrix("ab", "xyz").values).all()


def repeat(rounds, batches, factor, task, domain, repetitions=2000, dimension=6):
    """Measure a known truth with fresh tasks every round; every column is a repetition."""
    random = np.random.default_rng([rounds, batches])
    g_i, g_j = random.normal(size=(2, repetitions, dimension))
    estimator = Estimator(1, repetitions)
    for _ in range(rounds):
        queries = g_i[:, None] + task * random.normal(size=(repetitions, 2, dimension))
        estimator.forget(factor)
        estimator.begin_round([0, 0], [0.5, 0.5])
        for _ in range(batches):
            gradients = g_j + domain * random.normal(size=(repetitions, dimension))
            products = 10 * np.einsum("rqd,rd->qr", queries, gradients)
            estimator.add(products, np.full(repetitions, 10.0))
    return (g_i * g_j).sum(1), estimator.matrix(["t"], [f"d{k}" for k in range(repetitions)])


@pytest.mark.parametrize("factor", [1.0, 0.9])
@pytest.mark.parametrize(("rounds", "batches"), [(40, 1), (40, 4), (10, 4)])
@pytest.mark.parametrize(("task", "domain"), [(3.0, 1.0), (1.0, 3.0)])
def test_stderr_is_that_of_repeated_measurements(rounds, batches, factor, task, domain):
    truth, matrix = repeat(rounds, batches, factor, task, domain)
    error = matrix.values[0] - truth
    # Known to 2% from 2000 repetitions; the rest is the bias of ratio and clipping.
    assert np.sqrt((matrix.stderr**2).mean()) == pytest.approx(np.sqrt((error**2).mean()), rel=0.1)
    low, high = matrix.interval(0.95)
    assert 0.93 <= ((low[0] <= truth) & (truth <= high[0])).mean() <= 0.98


# Micro-batches of a domain in round after round, and what is forgotten before each. (Where less than one degree of
# freedom is left, taking negative parts for zero makes standard errors up to 20% too large.)
PAUSED = {
    "back after a pause": ([1] * 30 + [0] * 20 + [1] * 2, 0.9),
    "back in force": ([4] * 20 + [0] * 25 + [4], 0.9),
    "fast": ([1] * 12, 0.5),
    "one step after a pause": ([2] * 10 + [0] * 2 + [1], 0.8),
}


@pytest.mark.parametrize("case", PAUSED)
@pytest.mark.parametrize("task", [0.0, 1.0])
def test_stderr_of_a_domain_that_pauses(case, task):
    counts, factor = PAUSED[case]
    random, repetitions, dimension = np.random.default_rng(7), 4000, 6
    g_i, g_j = random.normal(size=(2, repetitions, dimension))
    estimator = Estimator(1, repetitions)
    for count in counts:
        queries = g_i[:, None] + task * random.normal(size=(repetitions, 2, dimension))
        estimator.forget(factor)
        estimator.begin_round([0, 0], [0.5, 0.5])
        for _ in range(count):
            gradients = g_j + random.normal(size=(repetitions, dimension))
            estimator.add(10 * np.einsum("rqd,rd->qr", queries, gradients), np.full(repetitions, 10.0))
    matrix = estimator.matrix(["t"], [f"d{k}" for k in range(repetitions)])
    error = matrix.values[0] - (g_i * g_j).sum(1)
    assert np.sqrt((matrix.stderr**2).mean()) == pytest.approx(np.sqrt((error**2).mean()), rel=0.1)


def test_a_round_with_a_single_split_is_taken_to_be_as_noisy_as_the_others():
    def measured(known_rounds, unknown_rounds):
        estimator, draws = Estimator(1, 2), np.random.default_rng(11)
        for k in range(known_rounds + unknown_rounds):
            alone = k >= known_rounds
            estimator.begin_round([0] if alone else [0, 0], [1.0] if alone else [0.5, 0.5])
            for _ in range(3):
                estimator.add(draws.normal(size=(1 if alone else 2, 2)), np.array([10.0, 5.0]))
        return estimator

    some, known = measured(6, 2).matrix("t", "ab"), measured(6, 0).matrix("t", "ab")
    assert np.isfinite(some.stderr).all()
    # Of 8 rounds of the same tokens, 8/6 of the variance of the sums over 6 of them.
    assert some.stderr_task * 8 == pytest.approx(known.stderr_task * 6 * np.sqrt(8 / 6))
    estimator = measured(0, 3)
    assert np.isnan(estimator.matrix("t", "ab").stderr).all()
    for _ in range(2):
        estimator.forget(0.1)
        estimator.begin_round([0, 0], [0.5, 0.5])
        for _ in range(3):
            estimator.add(np.random.default_rng(1).normal(size=(2, 2)), np.array([10.0, 5.0]))
    assert np.isfinite(estimator.matrix("t", "ab").stderr).all(), "known again once a round tells it"


def test_what_faded_altogether_is_as_if_never_measured():
    estimator, fresh, random = Estimator(1, 2), Estimator(1, 2), np.random.default_rng(12)
    old = random.normal(size=(5, 2, 2)) * 10
    estimator.begin_round([0, 0], [0.5, 0.5])
    for products in old:
        estimator.add(products, np.array([10.0, 10.0]))
    for _ in range(100):
        estimator.forget(0.4)
        estimator.begin_round([0, 0], [0.5, 0.5])
        new = random.normal(size=(2, 2)) * np.array([1.0, 0.0])
        estimator.add(new, np.array([10.0, 0.0]))
    matrix = estimator.matrix("t", "ab")
    assert np.isfinite(matrix.stderr[0, 0])
    assert np.isnan(matrix.values[0, 1])
    assert (matrix.tokens[1], matrix.microbatches[1]) == (0, 0)
    for each in (estimator, fresh):
        each.forget(0.4)
        each.begin_round([0, 0], [0.5, 0.5])
        for products in old:
            each.add(products, np.array([10.0, 10.0]))
    ours, theirs = estimator.matrix("t", "ab"), fresh.matrix("t", "ab")
    for name in ("values", "stderr", "stderr_domain", "stderr_task", "dof", "tokens", "effective_microbatches"):
        assert getattr(ours, name)[..., 1] == pytest.approx(getattr(theirs, name)[..., 1], rel=1e-6), name
    again = Estimator(1, 2)
    again.load_state_dict(json.loads(json.dumps(estimator.state_dict())))
    assert again.state_dict() == estimator.state_dict()


def test_record_fades_and_keeps_new_micro_batches_apart():
    random, record = np.random.default_rng(0), MicrobatchRecord(1, 2, blocks=8)
    none, tokens, sums = np.zeros((1, 2)), np.zeros(2), np.zeros((1, 2))
    for step in range(200):
        record.forget(0.9)
        new_tokens = np.array([random.integers(5, 9), 4.0 * (step % 3 == 0)])
        new_sums = random.normal(size=(1, 2)) * new_tokens
        record.add(new_sums, new_tokens, none, none)
        tokens, sums = 0.9 * tokens + new_tokens, 0.9 * sums + new_sums
        newest = new_tokens[0], new_sums[0, 0]
    for j in range(2):
        of_blocks, sums_of_blocks = record.of_domain(j)
        assert len(of_blocks) == 8
        assert of_blocks.sum() == pytest.approx(tokens[j])
        assert sums_of_blocks[0].sum() == pytest.approx(sums[0, j])
    of_blocks, sums_of_blocks = record.of_domain(0)
    assert (of_blocks[-1], sums_of_blocks[0, -1]) == newest
    assert of_blocks.max() < 0.3 * of_blocks.sum(), "no block holds most of the weight"


def test_record_begins_to_fade_when_blocks_hold_several():
    record, none = MicrobatchRecord(1, 1, blocks=4), np.zeros((1, 1))
    for _ in range(7):
        record.add(np.full((1, 1), 2.0), np.array([1.0]), none, none)
    record.forget(0.5)
    record.add(np.full((1, 1), 2.0), np.array([1.0]), none, none)
    tokens, sums = record.of_domain(0)
    assert tokens.tolist() == [1.0, 1.0, 1.5, 1.0]  # of 2, 2, 2 and 1, all half as heavy, and the new one
    assert (sums[0] == 2 * tokens).all()


@pytest.mark.parametrize("factor", [1.0, 0.8])
def test_state_goes_on_bit_equal(factor):
    fed = draw_rounds(np.random.default_rng(3), 12, 2)
    whole, first, second = Estimator(2, 3), Estimator(2, 3), Estimator(2, 3)
    run_rounds(whole, fed, factor)
    run_rounds(first, fed[:6], factor)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    run_rounds(second, fed[6:], factor)
    for name in ("values", "stderr", "dof", "tokens"):
        ours, theirs = (getattr(each.matrix("ab", "xyz"), name) for each in (whole, second))
        assert (ours == theirs).all(), name
    matrix = second.matrix("ab", "xyz")
    again = InfluenceMatrix.from_dict(json.loads(json.dumps(matrix.to_dict())))
    assert (again.split_half().half == whole.matrix("ab", "xyz").split_half().half).all()


@pytest.mark.parametrize("factor", [1.0, 0.9])
def test_heavy_tails_are_looked_for_among_equals(factor):
    random, alarms, found = np.random.default_rng(5), 0, 0
    for _ in range(60):
        estimator = Estimator(1, 3)
        rounds = [(random.normal(size=(1, 2, 3)) * 10, np.full((1, 3), 10.0)) for _ in range(90)]
        run_rounds(estimator, rounds, factor, owners=(0, 0))
        alarms += estimator.matrix("a", "xyz").tails().heavy.any()
        rounds[-3][0][:, :, 1] += 100.0
        estimator.reset()
        run_rounds(estimator, rounds, factor, owners=(0, 0))
        found += estimator.matrix("a", "xyz").tails().heavy[0].tolist() == [False, True, False]
    # One matrix in 20 is expected; 10 of 60 by chance once in a thousand times.
    assert alarms < 10
    assert found > 50
