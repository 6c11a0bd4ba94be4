"""The plan of the draws: weights held within one draw at every prefix, and no rank tied to a domain."""

from __future__ import annotations

import heapq
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tikmix_fast.data.draw_order import BLOCK, _earliest_first, check_counts, quantize, schedule_block


def planned(weights, blocks=1, seed=0):
    """Plan blocks one after the other and return the domain of each draw."""
    shares = quantize(np.asarray(weights, dtype=float))
    counts = np.zeros(len(shares), dtype=np.int64)
    parts = []
    for block in range(blocks):
        parts.append(schedule_block(shares, block * BLOCK, counts, seed, block))
        counts = counts + np.bincount(parts[-1], minlength=len(shares))
        check_counts(shares, (block + 1) * BLOCK, counts)
    return np.concatenate(parts)


def largest_deviation(labels, weights):
    """Return the largest |draws of a domain - weight * draws| over all domains and prefixes, counted plainly."""
    weights = np.asarray(weights, dtype=float) / np.sum(weights)
    prefixes = np.arange(1, len(labels) + 1)
    return max(np.abs(np.cumsum(labels == j) - w * prefixes).max() for j, w in enumerate(weights))


@st.composite
def mixtures(draw):
    size = draw(st.integers(1, 64))
    kind = draw(st.sampled_from(["any", "tiny", "whole", "near one"]))
    if kind == "whole":  # small fractions, whose turns open and close together
        parts = draw(st.lists(st.integers(0, 6), min_size=size, max_size=size).filter(any))
        return np.array(parts) / np.sum(parts)
    exponents = {"any": (-2, 0), "tiny": (-12, 0), "near one": (-7, -5)}[kind]
    powers = draw(st.lists(st.floats(*exponents), min_size=size, max_size=size))
    weights = 10.0 ** np.array(powers)
    zeros = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    weights[np.array(zeros)] = 0
    weights[draw(st.integers(0, size - 1))] = 1.0
    return weights / weights.sum()


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.integers(0, 2**64 - 1))
def test_every_prefix_is_within_one_draw_of_the_weights(weights, seed):
    assert largest_deviation(planned(weights, 2, seed), weights) < 1


@pytest.mark.parametrize(
    "weights",
    [
        np.ones(64),
        np.arange(1, 65),
        np.r_[63, np.ones(63)],
        2.0 ** -np.arange(64),
        np.random.default_rng(0).dirichlet(np.full(64, 0.1)),
        np.random.default_rng(1).dirichlet(np.ones(500)),
        # Many turns that close after more than two blocks, some of them soon after: all of these must come first.
        np.r_[1 - 335e-6, np.full(13, 25e-6), np.full(100, 1e-7)],
    ],
    ids=["equal", "linear", "half", "powers", "sparse", "500", "late"],
)
def test_many_domains_stay_within_one_draw_over_many_blocks(weights):
    assert largest_deviation(planned(weights / weights.sum(), 5), weights) < 1


def test_zero_weights_are_never_drawn_and_tiny_ones_are_in_time():
    labels = planned([0.0, 1 - 1e-4, 1e-4], 4)
    assert not (labels == 0).any()
    places = np.flatnonzero(labels == 2)
    assert np.array_equal(places // 10_000, np.arange(len(places)))  # one in each 10000, as 1e-4 allows no more
    assert len(places) >= 6


def test_the_bound_holds_far_into_a_run():
    # After a multiple of 10 draws these weights have an exact state, so a late block can be planned alone.
    weights = np.array([0.5, 0.25, 0.125, 0.125])
    elapsed = BLOCK * 10**7
    labels = schedule_block(quantize(weights), elapsed, (weights * elapsed).astype(np.int64), 0, elapsed)
    assert largest_deviation(labels, weights) < 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=64).filter(lambda w: sum(w) > 1e-3))
def test_quantize_is_exact_in_sum_and_within_one_unit(weights):
    weights = np.array(weights)
    shares = quantize(weights)
    assert shares.sum() == 2**48
    assert not shares[weights == 0].any()
    total = sum(map(Fraction, weights))
    assert all(
        abs(int(s) - Fraction(w) / total * 2**48) <= Fraction(17, 16) for s, w in zip(shares, weights, strict=True)
    )


@pytest.mark.parametrize("world_size", [2, 8, 64])
def test_equal_weights_on_as_many_ranks_do_not_tie_a_rank_to_a_domain(world_size):
    labels = planned(np.ones(world_size) / world_size, 4)
    rows = labels.reshape(-1, world_size)  # [draws of a rank, rank]
    expected = len(rows) / world_size
    deviation = np.sqrt(expected * (1 - 1 / world_size))
    for rank in range(world_size):
        counts = np.bincount(rows[:, rank], minlength=world_size)
        assert np.abs(counts - expected).max() < 5 * deviation, rank


@pytest.mark.parametrize(
    ("weights", "world_size"),
    [
        ([0.9, 0.1], 10),
        ([0.99, 0.01], 100),
        ([0.8, 0.1, 0.1], 10),
        ([0.5, 0.25, 0.25], 4),
        ([0.5, 0.25, 0.25], 8),
        ([2 / 3, 1 / 3], 3),
        ([0.7, 0.2, 0.1], 10),
        ([0.4, 0.3, 0.2, 0.1], 10),
        ([0.49, 0.49, 0.02], 50),
        ([0.5, *[1 / 126] * 63], 126),
    ],
    ids=str,
)
def test_weights_in_step_with_the_ranks_do_not_tie_a_rank_to_a_domain(weights, world_size):
    # In the unshuffled order of least closing time some ranks have a share of 0 or 1 in each of these cases.
    labels = planned(weights, 4)
    rows = labels[: len(labels) // world_size * world_size].reshape(-1, world_size)
    for domain, weight in enumerate(weights):
        shares = (rows == domain).mean(axis=0)
        noise = np.sqrt(weight * (1 - weight) / len(rows))
        assert np.abs(shares - weight).max() < 0.15 + 4 * noise
        if weight * len(rows) > 50:
            assert shares.min() > 0
        if (1 - weight) * len(rows) > 50:
            assert shares.max() < 1


def test_the_order_depends_on_seed_and_stream_and_on_nothing_else():
    shares, zero = quantize(np.ones(8) / 8), np.zeros(8, dtype=np.int64)
    first = schedule_block(shares, 0, zero, 1, 2)
    assert np.array_equal(first, schedule_block(shares, 0, zero, 1, 2))
    for seed, stream in ((0, 2), (1, 3), (2, 1)):
        assert (first != schedule_block(shares, 0, zero, seed, stream)).mean() > 0.5


@pytest.mark.parametrize(
    "counts", [[BLOCK, 0], [BLOCK // 2 - 1, BLOCK // 2 + 1], [BLOCK // 2, BLOCK // 2 - 1], [-1, 2**62]]
)
def test_counts_that_cannot_be_are_refused(counts):
    with pytest.raises(ValueError, match="counts must follow the weights"):
        check_counts(quantize(np.array([0.5, 0.5])), BLOCK, np.array(counts))


def test_the_order_is_fixed_for_all_time():
    # A resumed run relies on these numbers: if they change, raise the version of the sampler's state.
    labels = planned([0.5, 0.3, 0.2])
    assert labels[:24].tolist() == [1, 0, 2, 0, 1, 0, 0, 1, 0, 2, 0, 2, 1, 0, 0, 2, 1, 0, 0, 1, 0, 2, 1, 0]
    assert int((labels.astype(np.int64) * np.arange(BLOCK)).sum()) == 93950095


@given(st.lists(st.tuples(st.integers(0, 2**62), st.integers(0, 3)), min_size=1, max_size=60))
def test_native_heap_draws_as_pythons_own(arrivals):
    keys = np.array([key for key, _ in arrivals])
    # Each slot after the first sees 0 to 3 more, but never fewer than the slots so far.
    arrived = np.maximum(np.cumsum([more for _, more in arrivals]), np.arange(1, len(keys) + 1)).clip(max=len(keys))
    waiting, expected, before = [], [], 0
    for now in arrived.tolist():
        for key in keys[before:now].tolist():
            heapq.heappush(waiting, key)
        before = now
        expected.append(heapq.heappop(waiting))
    assert _earliest_first(keys, arrived).tolist() == expected


def test_more_slots_than_arrivals_are_refused():
    with pytest.raises(ValueError, match="more slots than keys"):
        _earliest_first(np.array([1, 2]), np.array([1, 1]))


def test_without_the_native_module_the_sampler_gives_the_reason_that_ops_gives():
    script = """
import sys
sys.modules["tikmix_fast._cpu"] = None  # an import of it fails
from tikmix_fast import ops
try:
    from tikmix_fast import MixtureSampler
except ImportError as error:
    print(error)
    print(ops.available_backends()["cpu"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    message, reason = done.stdout.splitlines()
    assert message == f"MixtureSampler cannot be used: {reason}"
    assert "reinstall tikmix_fast" in reason
