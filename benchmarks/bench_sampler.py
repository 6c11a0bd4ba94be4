"""Draws per second and memory of the sampler.

pytest benchmarks/bench_sampler.py --benchmark-json sampler.json
"""

from __future__ import annotations

from benchmarks.suites.sampler import measure_sampler
from tikmix_fast.benchmarking.suites import BenchSettings


def test_draws(benchmark, settings: BenchSettings) -> None:
    draws = 10**4 if settings.size == "tiny" else 10**6
    result = benchmark.pedantic(measure_sampler, kwargs={"draws": draws, "rounds": min(settings.rounds, 10)}, rounds=1)
    benchmark.extra_info.update(result)
    for row in [*result["rows"], *result["memory"]]:
        print(row)
