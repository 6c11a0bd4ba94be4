"""Counting against measurements: the committed grid, with the constants of today."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.suites.choice import TINY_GRID, measure_choice
from tikmix_fast.ops.backends.cpu.cost import count_costs

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "choice.json"


def test_the_chosen_way_is_about_the_fastest_that_was_measured() -> None:
    if not RESULTS.exists():
        pytest.skip(f"no {RESULTS.name}: python benchmarks/run.py makes it")
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    pairs_here = "avx512_bf16" in result["environment"]["machine"]["instruction sets"]
    for case in result["cases"]:
        domains = case["rows"] // case["rows_per_domain"]
        counted = count_costs(
            *(case["rows"], case["height"], case["width"], domains, case["tasks"]),
            with_total=False,
            pairs=case["dtype"] == "bfloat16" and pairs_here,
        )
        chosen = "row_wise" if counted.row_wise < counted.fused else "fused"
        assert case["seconds"][chosen] <= 1.35 * min(case["seconds"].values()), (case, counted)
        assert case["seconds"]["two_pass"] >= case["seconds"]["fused"], case


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_ways_are_checked_and_timed(dtype: str) -> None:
    for case in TINY_GRID:
        found = measure_choice(case, dtype, rounds=1)
        assert set(found["seconds"]) == {"fused", "two_pass", "row_wise"}
        assert found["chosen"] in found["seconds"]
        assert min(found["seconds"].values()) > 0
