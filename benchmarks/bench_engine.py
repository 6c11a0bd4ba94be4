"""Whole training steps and whole measurements with the engine, and neighbouring libraries where they are installed.

pytest benchmarks/bench_engine.py --benchmark-json engine.json

Each test makes one comparison: everything is compared with float64, then all ways take turns (`interleave`); the rows
with their ratios are in ``extra_info``, and what pytest-benchmark itself times is that whole comparison, once.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.suites.neighbours import find_neighbours
from tikmix_fast.benchmarking import engine
from tikmix_fast.benchmarking.suites import BenchSettings


def once(benchmark, function, *arguments, **options) -> dict[str, Any]:
    result = benchmark.pedantic(function, arguments, options, rounds=1)
    benchmark.extra_info.update(result)
    for row in result["rows"]:
        print(row)
    return result


@pytest.mark.parametrize("index", range(len(engine.STEPS)), ids=[case.dtype for case in engine.STEPS])
def test_step(benchmark, settings: BenchSettings, index: int) -> None:
    cases = engine.TINY_STEPS if settings.size == "tiny" else engine.STEPS
    once(benchmark, engine.measure_step, cases[index], rounds=settings.rounds)


def test_measurement(benchmark, settings: BenchSettings) -> None:
    once(
        benchmark, engine.measure_measurement, measurement(settings), engine.measurement_methods(),
        rounds=settings.rounds,
    )  # fmt: skip


NEIGHBOURS, MISSING = find_neighbours()


@pytest.mark.parametrize("name", [*NEIGHBOURS, *MISSING])
def test_neighbour(benchmark, settings: BenchSettings, name: str) -> None:
    if name in MISSING:
        pytest.skip(MISSING[name])
    methods = {engine.FLOOR: engine.measurement_methods()[engine.FLOOR], name: NEIGHBOURS[name]}
    once(benchmark, engine.measure_measurement, measurement(settings), methods, rounds=min(settings.rounds, 6))


def test_memory(benchmark, settings: BenchSettings) -> None:
    once(benchmark, engine.weigh_measurement, measurement(settings), (4, 64), repeats=1)


def measurement(settings: BenchSettings) -> engine.MeasurementCase:
    return engine.TINY_MEASUREMENT if settings.size == "tiny" else engine.MEASUREMENT
