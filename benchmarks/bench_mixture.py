"""TiKMiX-D by every solver that takes the size.

pytest benchmarks/bench_mixture.py --benchmark-json mixture.json
"""

from __future__ import annotations

import pytest

from benchmarks.suites.mixture import SHAPES, TINY_SHAPES, make_problem, measure_mixture
from tikmix_fast import tikmix_d
from tikmix_fast.benchmarking.suites import BenchSettings


@pytest.mark.parametrize("solver", ["auto", "slsqp", "interior"])
@pytest.mark.parametrize("index", range(len(SHAPES)), ids=[f"m={m}-n={n}" for m, n in SHAPES])
def test_tikmix_d(benchmark, settings: BenchSettings, index: int, solver: str) -> None:
    shapes = TINY_SHAPES if settings.size == "tiny" else SHAPES
    domains, tasks = shapes[index % len(shapes)]
    result = measure_mixture(domains, tasks, rounds=1)  # raises if a solver fails or the solvers disagree
    if solver in result["skipped"]:
        pytest.skip(result["skipped"][solver])
    matrix, prior = make_problem(domains, tasks)
    benchmark(tikmix_d, matrix, prior, diversity=0.3, solver=solver)
