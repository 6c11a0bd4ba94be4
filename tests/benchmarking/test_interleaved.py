"""The runner: every function once per round, and intervals that cover what they say."""

from __future__ import annotations

import gc
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from tikmix_fast.benchmarking.interleaved import Timings, interleave, median_interval


def test_every_function_runs_once_per_round_in_changing_order() -> None:
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = interleave(functions, rounds=20, warm_up=2)
    rounds = [tuple(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert len(rounds) == 22
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 3
    assert timings.rounds == 20
    assert {len(each) for each in (*timings.wall.values(), *timings.cpu.values())} == {20}


def test_waiting_takes_wall_time_and_no_cpu_time() -> None:
    timings = interleave({"wait": lambda: time.sleep(0.02), "work": lambda: sum(range(300_000))}, rounds=3)
    assert timings.wall["wait"].min() >= 0.02
    assert timings.cpu["wait"].max() < 0.015
    assert timings.cpu["work"].min() > 0


@pytest.mark.parametrize(("rounds", "expected"), [(1, 1), (2, 2), (1000, 3)])
def test_a_limit_in_seconds_leaves_three_rounds(rounds: int, expected: int) -> None:
    assert interleave({"a": lambda: time.sleep(0.01)}, rounds=rounds, warm_up=0, seconds=0.001).rounds == expected


def test_the_collector_is_off_while_timing_and_on_afterwards() -> None:
    states: list[bool] = []
    interleave({"a": lambda: states.append(gc.isenabled())}, rounds=2)
    assert not any(states)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 / 0})
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("options", "message"), [({"rounds": 0}, "rounds must be"), ({"rounds": -1}, "rounds must be")]
)
def test_mistakes_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interleave({"a": int}, **options)
    with pytest.raises(ValueError, match="functions must hold"):
        interleave({})


def test_ratios_are_of_medians_and_intervals_of_pairs() -> None:
    # The machine is ten times slower in half of the rounds: pairs see through that.
    slow = np.tile([1.0, 10.0], 10)
    timings = Timings({"a": 2 * slow, "b": slow}, {"a": 3 * slow, "b": slow})
    summary = timings.summary("a", "b")
    assert summary["ratio"] == 2
    assert summary["ratio_interval"] == [2, 2]
    assert summary["seconds"] == 11
    assert summary["quartiles"] == [2, 20]
    assert summary["cpu_seconds"] == 16.5
    assert summary["rounds"] == 20


def test_too_few_rounds_have_no_interval() -> None:
    five = np.arange(1.0, 6.0)
    assert Timings({"a": five, "b": five}, {"a": five, "b": five}).summary("a", "b")["ratio_interval"] is None


@given(st.integers(6, 200), st.sampled_from([0.8, 0.95, 0.99]))
def test_the_interval_is_the_narrowest_of_its_kind_that_has_the_confidence(count: int, confidence: float) -> None:
    """P(the k-th smallest of n < median < the k-th largest) = 1 - 2 P(Binomial(n, 1/2) < k)."""
    interval = median_interval(np.random.default_rng(count).permutation(count).astype(float), confidence)
    if interval is None:
        assert 1 - 2 * binom.pmf(0, count, 0.5) < confidence
        return
    low, high = interval
    assert low + high == count - 1
    k = int(low) + 1
    assert 1 - 2 * binom.cdf(k - 1, count, 0.5) >= confidence
    assert 1 - 2 * binom.cdf(k, count, 0.5) < confidence


def test_the_interval_covers() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        low, high = median_interval(random.exponential(size=20))
        hits += low <= np.log(2) <= high
    assert hits / 400 > 0.93
