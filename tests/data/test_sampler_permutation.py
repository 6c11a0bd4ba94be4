"""The computed shuffles: one-to-one for every length, keyed, and without a visible pattern."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from tikmix_fast.data.permutation import MAX_LENGTH, mix, permute


def shuffled(positions, length, key):
    positions = np.asarray(positions, dtype=np.uint64)
    return permute(positions, np.full_like(positions, length), np.full_like(positions, key))


def keys(n, salt=0):
    return mix(np.arange(n, dtype=np.uint64) + np.uint64(salt))


def test_is_a_bijection_for_every_length_up_to_2000():
    key = int(keys(1, salt=5)[0])
    for length in range(1, 2001):
        assert np.array_equal(np.sort(shuffled(np.arange(length), length, key)), np.arange(length)), length


@pytest.mark.parametrize("length", [10**9, 2**30, 2**30 + 1, 2**40 - 1, MAX_LENGTH])
def test_is_one_to_one_and_in_range_for_long_domains(length):
    positions = np.unique(np.random.default_rng(0).integers(length, size=200_000, dtype=np.uint64))
    images = shuffled(positions, length, 77)
    assert images.max() < length
    assert len(np.unique(images)) == len(positions)


def test_each_element_has_its_own_length_and_key():
    rng = np.random.default_rng(1)
    length = rng.integers(1, 5000, size=300, dtype=np.uint64)
    position = rng.integers(length, dtype=np.uint64)
    key = keys(300)
    together = permute(position, length, key)
    alone = [shuffled([p], n, k)[0] for p, n, k in zip(position, length, key, strict=True)]
    assert np.array_equal(together, alone)


def test_another_key_is_another_order():
    orders = [tuple(shuffled(np.arange(100), 100, key).tolist()) for key in keys(50)]
    assert len(set(orders)) == 50


@pytest.mark.parametrize(("length", "tolerance"), [(2, 0.03), (3, 0.04), (4, 0.08)])
def test_every_order_of_few_items_is_about_equally_frequent(length, tolerance):
    many = 100_000
    images = permute(
        np.tile(np.arange(length, dtype=np.uint64), many),
        np.full(many * length, length, dtype=np.uint64),
        np.repeat(keys(many), length),
    )
    counts = Counter(map(tuple, images.reshape(many, length).tolist()))
    orders = list(permutations(range(length)))
    shares = np.array([counts[order] for order in orders]) * len(orders) / many
    assert np.abs(shares - 1).max() < tolerance


@pytest.mark.parametrize("length", [1000, 10**6, 10**9])
@pytest.mark.parametrize("apart", [1, 512])
def test_two_items_land_independently_over_keys(length, apart):
    many, bins = 100_000, 10
    first, second = (
        permute(np.full(many, p, np.uint64), np.full(many, length, np.uint64), keys(many))
        * np.uint64(bins)
        // np.uint64(length)
        for p in (3, 3 + apart)
    )
    table = np.bincount((first * np.uint64(bins) + second).astype(int), minlength=bins**2)
    assert stats.chisquare(table).pvalue > 1e-4


@pytest.mark.parametrize("length", [5000, 10**9])
def test_one_order_has_no_trend_and_no_serial_correlation(length):
    for key in keys(5, salt=9):
        images = shuffled(np.arange(5000), length, key).astype(float)
        assert abs(np.corrcoef(np.arange(5000), images)[0, 1]) < 0.06  # 4 standard errors
        assert abs(np.corrcoef(images[1:], images[:-1])[0, 1]) < 0.06


def test_the_orders_are_fixed_for_all_time():
    # A resumed run relies on these numbers: if they change, raise the version of the sampler's state.
    assert shuffled(np.arange(8), 8, 0).tolist() == [7, 6, 2, 1, 0, 4, 3, 5]
    assert shuffled([0, 1, 10**9 - 1], 10**9, 2**64 - 1).tolist() == [618212803, 771381086, 884198733]
