"""Suites that only this repository runs, beside those of ``tikmix-fast bench``: `ALL_SUITES` holds both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.forced import instruction_set_methods
from benchmarks.suites import choice, mixture, neighbours, sampler
from tikmix_fast.benchmarking.baselines import Method
from tikmix_fast.benchmarking.ops import Case
from tikmix_fast.benchmarking.suites import BenchSettings, Suite, Tell, engine_suite, ops_suite

__all__ = ["ALL_SUITES"]


def _ops(settings: BenchSettings, tell: Tell) -> dict[str, Any]:
    def others(case: Case) -> Mapping[str, Method]:
        # Without vector instructions, larger cases take seconds per call.
        forced = settings.size == "full" and not case.projection and case.plain_flops < 1e10
        return instruction_set_methods() if forced else {}

    return ops_suite(settings, tell, others)


def _choice(settings: BenchSettings, tell: Tell) -> dict[str, Any]:
    grid = {"full": choice.GRID, "quick": choice.QUICK_GRID, "tiny": choice.TINY_GRID}[settings.size]
    cases = []
    for dtype in ("float32", "bfloat16"):
        tell(f"both ways to group influence in {dtype}")
        cases += [choice.measure_choice(case, dtype, rounds=min(settings.rounds, 5)) for case in grid]
    return {"cases": cases}


def _engine(settings: BenchSettings, tell: Tell) -> dict[str, Any]:
    return engine_suite(settings, tell, *neighbours.find_neighbours())


def _mixture(settings: BenchSettings, tell: Tell) -> dict[str, Any]:
    shapes = mixture.TINY_SHAPES if settings.size == "tiny" else mixture.SHAPES
    cases = []
    for domains, tasks in shapes:
        tell(f"TiKMiX-D with {domains} domains and {tasks} tasks")
        cases.append(mixture.measure_mixture(domains, tasks, rounds=settings.rounds, seconds=settings.seconds))
    return {"cases": cases}


def _sampler(settings: BenchSettings, tell: Tell) -> dict[str, Any]:
    tell("draws of 64 domains")
    draws = {"full": 10**6, "quick": 2 * 10**5, "tiny": 10**4}[settings.size]
    rounds = min(settings.rounds, 10)
    return {"cases": [sampler.measure_sampler(draws=draws, rounds=rounds, seconds=settings.seconds)]}


ALL_SUITES: Mapping[str, Suite] = {
    "ops": _ops,
    "choice": _choice,
    "engine": _engine,
    "mixture": _mixture,
    "sampler": _sampler,
}
"""All suites by name; the kernels also run with forced instruction sets, the engine beside other libraries."""
