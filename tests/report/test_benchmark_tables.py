"""Tables of benchmarks: the numbers of the result, its slower cases too, and why something is missing."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.text import Text
from rich.console import Console

from benchmarks.tables import ops_summary, suite_tables
from tikmix_fast.report.benchmark_tables import TextTable, benchmark_facts
from tikmix_fast.report.roofline import draw_roofline


def row(method: str, ratio: float, gives: list[str], **changes: Any) -> dict[str, Any]:
    return {
        "method": method,
        "ours": method.startswith("tikmix_fast"),
        "gives": gives,
        "seconds": 0.01 * ratio,
        "quartiles": [0.01 * ratio] * 2,
        "cpu_seconds": 0.02 * ratio,
        "rounds": 20,
        "ratio": ratio,
        "ratio_interval": [0.99 * ratio, 1.02 * ratio],
        "flops_per_second": 1e11 / ratio,
        "peak_share": 0.5 / ratio,
        "bytes_per_second": 1e9,
        "bandwidth_share": 0.05,
        "scratch_bytes": 3 << 20,
        "peak_bytes": 1 << 30,
        "error": 3.4e-9,
        "total_error": 1e-6,
        "sampling_error": None,
        **changes,
    }


BOTH = ["influence", "total"]
ENVIRONMENT = {
    "machine": {"processor": "P", "threads": 2},
    "packages": {"torch": "2"},
    "commit": "0123456789abcdef with changes",
}


@pytest.fixture
def ops_result() -> dict[str, Any]:
    def case(name: str, ours: float, intensity: float) -> dict[str, Any]:
        return {
            "case": name,
            "dtype": "float32",
            "tokens_per_domain": 512.0,
            "threads": 2,
            "intensity": intensity,
            "main": "tikmix_fast",
            "rows": [
                row("plain weight gradient", 1.0, ["total"], error=None, ratio_interval=[1.0, 1.0]),
                row("torch, stacked + GEMM", 1.3, BOTH, scratch_bytes=32 << 20),
                row("grouped_mm + GEMM", 1.1, BOTH, scratch_bytes=None),
                row("tikmix_fast, influence only", 0.4, ["influence"], total_error=None),
                row("tikmix_fast", ours, BOTH, scratch_bytes=1 << 20),
            ],
            "skipped": {"oneDNN": "it is not built in"},
        }

    return {
        "suite": "ops",
        "date": "2026-01-01",
        "environment": ENVIRONMENT,
        "rates": {"flops": {"float32": 2e11, "bfloat16": 4e11}, "found_by": {}, "bandwidth": 2e10},
        "cases": [case("fast case", 0.62, 160.0), case("slow case", 1.2, 60.0)],
    }


def test_every_method_has_its_row(ops_result: dict[str, Any]) -> None:
    first, second = suite_tables(ops_result)
    assert first.title == "fast case: 512 tokens per domain, 2 threads"
    cells = {row[0]: row[1:] for row in first.rows}
    assert cells["plain weight gradient"] == ["10", "1.00", "100 (50%)", "1 (5%)", "3 MiB", "-", "1e-6"]
    assert cells["tikmix_fast"] == ["6.2", "0.62 [0.61, 0.63]", "161 (81%)", "1 (5%)", "1 MiB", "3e-9", "1e-6"]
    assert cells["grouped_mm + GEMM"][4] == "-"
    assert first.bold == {3, 4}
    assert first.notes == ["oneDNN left out: it is not built in"]
    assert {row[0]: row[2] for row in second.rows}["tikmix_fast"] == "1.20 [1.19, 1.22]"


def test_the_summary_names_the_fastest_that_gives_as_much_and_who_is_slower(ops_result: dict[str, Any]) -> None:
    table = ops_summary(ops_result)
    assert table.rows[0] == [
        "fast case", "0.62 [0.61, 0.63]", "1.10 grouped_mm + GEMM", "1 MiB", "-", "161", "81%", "3e-9",
    ]  # fmt: skip
    assert table.rows[1][:3] == ["slow case", "1.20 [1.19, 1.22]", "1.10 grouped_mm + GEMM"]
    assert table.notes == ["Slower than the fastest other: slow case"]
    del ops_result["cases"][1]["rows"][-1]
    assert ops_summary(ops_result).rows[1][:2] == ["slow case", "not available here"]


def test_engine_mixture_and_sampler_tables() -> None:
    steps = [row("step without influence", 1.0, []), row("tikmix_fast", 1.03, [])]
    result = {
        "suite": "engine",
        "steps": [{"case": "a GPT", "rows": steps, "error": 2e-8, "eager_error": 3e-8, "skipped": {}}],
        "measurements": [{"case": "data", "rows": [{**each, "covers": "all"} for each in steps]}],
        "memory": {
            "case": "data",
            "rows": [{"domains": 64, "method": "x", "growth_bytes": 3 << 20, "above_floor_bytes": -(1 << 20)}],
        },
    }
    step, measurement, memory = suite_tables(result)
    assert step.title == "a GPT: error 2e-8, autograd's own 3e-8"
    assert step.rows[1] == ["tikmix_fast", "0.0103", "1.03 [1.02, 1.05]", "0.0206"]
    assert measurement.rows[1][-2:] == ["all", "3e-9"]
    assert memory.rows == [["64", "x", "3 MiB", "-1 MiB"]]
    result["memory"] = {}
    assert len(suite_tables(result)) == 2

    found = {"case": "m=9 n=2", "rows": [{**steps[0], "objective_above_best": 0.0}], "skipped": {"slsqp": "too large"}}
    (table,) = suite_tables({"suite": "mixture", "cases": [found]})
    assert table.rows == [["m=9 n=2, step without influence", "10", "0e+00"]]
    assert table.notes == ["m=9 n=2: slsqp left out: too large"]

    case = {
        "case": "2 domains",
        "rows": [{**steps[0], "draws_per_second": 1.5e6}],
        "memory": [{"domains": 2, "samples": 1000, "peak_bytes": 1 << 19}],
    }
    draws, memory = suite_tables({"suite": "sampler", "cases": [case]})
    assert draws.rows == [["step without influence", "1.50e+06"]]
    assert memory.rows == [["2 domains, 1e+03 samples", "0.5 MiB"]]


def test_choice_table() -> None:
    case = {"rows": 64, "height": 8, "width": 16, "rows_per_domain": 4, "tasks": 2, "dtype": "float32"}
    seconds = {"fused": 2e-3, "row_wise": 1.6e-3}
    (table,) = suite_tables({"suite": "choice", "cases": [{**case, "seconds": seconds, "chosen": "fused"}]})
    assert table.title == "Two ways, T=64 O=8 I=16, one thread"
    assert table.rows == [["float32, 4 rows per domain, n=2", "2", "1.6", "fused", "1.25"]]


def test_one_table_two_forms() -> None:
    table = TextTable("a [title]", ["x", "y"], [["one", "1"], ["[two]", "2"]], ["a note"], frozenset({1}))
    assert table.to_markdown() == "| x | y |\n|---|---:|\n| one | 1 |\n| **[two]** | 2 |\n\na note."
    console = Console(width=60, color_system=None)
    with console.capture() as capture:
        console.print(table.to_rich())
    shown = capture.get()
    assert all(each in shown for each in ("a [title]", "[two]", "a note"))


def test_facts(ops_result: dict[str, Any]) -> None:
    assert benchmark_facts(ops_result) == "P, 2 threads, torch 2, commit 0123456789 with changes, 2026-01-01"


def test_a_case_that_cannot_run_here_is_not_drawn(ops_result: dict[str, Any]) -> None:
    ops_result["cases"][1].update(rows=ops_result["cases"][1]["rows"][:1], main=None, projection=64)
    texts = {text.get_text() for legend in draw_roofline(ops_result).legends for text in legend.get_texts()}
    assert "fast case" in texts
    assert "slow case" not in texts


def test_the_roofline_shows_roofs_and_every_case(ops_result: dict[str, Any]) -> None:
    figure = draw_roofline(ops_result)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["float32: 200 GF/s", "bfloat16: 400 GF/s", "copy: 20 GB/s"]
    roof = axes.lines[0].get_xydata()
    assert roof[1].tolist() == [10, 200]  # 200 GF/s over 20 GB/s
    assert roof[0][1] == pytest.approx(roof[0][0] * 20)
    points = {(x, round(y, 6)) for x, y in (line.get_xydata()[0] for line in axes.lines if len(line.get_xdata()) == 1)}
    assert {(160.0, 100.0), (160.0, round(100 / 0.62, 6)), (160.0, round(100 / 1.1, 6))} <= points
    assert len(points) == 6
    low, high = axes.get_ylim()
    assert all(low < y < high for _, y in points)
    labels = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert {"fast case", "slow case", "tikmix_fast"} <= labels
    figure.canvas.draw()
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_tightbbox())
    assert figure.bbox.containsx(legend.get_window_extent().x1)
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 9
