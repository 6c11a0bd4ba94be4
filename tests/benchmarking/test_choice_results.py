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
        pytest.skip(f"no {RESULTS.name}: python -m benchmarks.run makes it")
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_ways_are_checked_and_timed(dtype: str) -> None:
    for case in TINY_GRID:
        result = measure_choice(case, dtype, rounds=1)
        assert set(result["seconds"]) == set(result["counted"]) == {"fused", "row_wise"}
        assert result["chosen"] in result["seconds"]
        assert min(result["seconds"].values()) > 0
