"""Whole training steps and whole measurements with the engine, and neighbouring libraries where they are installed.

pytest benchmarks/bench_engine.py --benchmark-json engine.json

Each test makes one comparison: it checks all ways against float64, then they take turns (`interleave`). The rows with
their ratios are in ``extra_info``; pytest-benchmark itself times the whole comparison, once.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.suites.neighbours import find_neighbours
from tikmix_fast.benchmarking import measurement, training_step
from tikmix_fast.benchmarking.suites import BenchSettings


def once(benchmark, function, *arguments, **options) -> dict[str, Any]:
    result = benchmark.pedantic(function, arguments, options, rounds=1)
    benchmark.extra_info.update(result)
    for row in result["rows"]:
        print(row)
    return result


@pytest.mark.parametrize("index", range(len(training_step.STEPS)), ids=[case.dtype for case in training_step.STEPS])
def test_step(benchmark, settings: BenchSettings, index: int) -> None:
    cases = training_step.TINY_STEPS if settings.size == "tiny" else training_step.STEPS
    once(benchmark, training_step.measure_step, cases[index], rounds=settings.rounds)


def test_measurement(benchmark, settings: BenchSettings) -> None:
    once(
        benchmark, measurement.measure_measurement, case_of(settings), measurement.measurement_methods(),
        rounds=settings.rounds,
    )  # fmt: skip


NEIGHBOURS, MISSING = find_neighbours()


@pytest.mark.parametrize("name", [*NEIGHBOURS, *MISSING])
def test_neighbour(benchmark, settings: BenchSettings, name: str) -> None:
    if name in MISSING:
        pytest.skip(MISSING[name])
    methods = {measurement.FLOOR: measurement.measurement_methods()[measurement.FLOOR], name: NEIGHBOURS[name]}
    once(benchmark, measurement.measure_measurement, case_of(settings), methods, rounds=min(settings.rounds, 6))


def test_memory(benchmark, settings: BenchSettings) -> None:
    once(benchmark, measurement.weigh_measurement, case_of(settings), (4, 64), repeats=1)


def case_of(settings: BenchSettings) -> measurement.MeasurementCase:
    return measurement.TINY_MEASUREMENT if settings.size == "tiny" else measurement.MEASUREMENT
