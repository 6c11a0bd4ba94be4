"""The exact kernel against every other way to the same numbers, each case by itself.

pytest benchmarks/bench_ops.py --benchmark-json ops.json

Every method is compared with float64 before it is timed. Tests are minutes apart, so do not compare their rows: the
ratios of methods come from the interleaved run (``python -m benchmarks.run``, ``tikmix-fast bench``).
"""

from __future__ import annotations

from functools import lru_cache

import pytest

from benchmarks.forced import instruction_set_methods
from tikmix_fast.benchmarking.baselines import Method
from tikmix_fast.benchmarking.ops import CASES, TINY_CASES, Case, CheckedMethod, check_methods, make_layer, methods_of
from tikmix_fast.benchmarking.suites import BenchSettings


def all_methods(case: Case) -> dict[str, Method]:
    return {**methods_of(case), **({} if case.projection else instruction_set_methods())}


PAIRS = [(case, name) for case in CASES for name in all_methods(case)]


@lru_cache(maxsize=1)
def checked(case: Case) -> tuple[dict[str, CheckedMethod], dict[str, str]]:
    return check_methods(make_layer(case), all_methods(case))


@pytest.mark.parametrize(("case", "name"), PAIRS, ids=[f"{case.name}-{name}" for case, name in PAIRS])
def test_method(benchmark, settings: BenchSettings, case: Case, name: str) -> None:
    if settings.size == "tiny":
        case = next(each for each in TINY_CASES if bool(each.projection) == bool(case.projection))
    methods, skipped = checked(case)
    if name in skipped:
        pytest.skip(skipped[name])
    method = methods[name]
    benchmark.extra_info.update(case=case.name, **method.errors._asdict())
    benchmark(method.run)
