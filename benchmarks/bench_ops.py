"""The exact kernel against every other way to the same numbers, each case by itself.

pytest benchmarks/bench_ops.py --benchmark-json ops.json

Every method is compared with float64 before it is timed. Timings of separate tests are minutes apart: ratios between
methods are those of the interleaved run (benchmarks/run.py, tikmix-fast bench), not those between these rows.
"""

from __future__ import annotations

from functools import lru_cache

import pytest

from tikmix_fast.benchmarking.baselines import exact_methods
from tikmix_fast.benchmarking.ops import CASES, TINY_CASES, Case, CheckedMethod, check_methods, make_layer
from tikmix_fast.benchmarking.suites import BenchSettings

METHODS = exact_methods(every_instruction_set=True)


@lru_cache(maxsize=1)
def checked(case: Case) -> tuple[dict[str, CheckedMethod], dict[str, str]]:
    return check_methods(make_layer(case), METHODS)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name.replace(" ", "-") for case in CASES])
@pytest.mark.parametrize("name", METHODS)
def test_method(benchmark, settings: BenchSettings, index: int, name: str) -> None:
    cases = TINY_CASES if settings.size == "tiny" else CASES
    case = cases[index % len(cases)]
    methods, skipped = checked(case)
    if name in skipped:
        pytest.skip(skipped[name])
    method = methods[name]
    benchmark.extra_info.update(case=case.name, error=method.error, total_error=method.total_error)
    benchmark(method.run)
