"""Tables of the suites that only this repository runs, and the summary of the kernels for the documents."""

from __future__ import annotations

from typing import Any

from tikmix_fast.report.benchmark_tables import (
    TextTable,
    benchmark_tables,
    bytes_text,
    error_text,
    main_rows,
    ratio_text,
    skipped_notes,
)

__all__ = ["ops_summary", "suite_tables"]


def suite_tables(result: dict[str, Any]) -> list[TextTable]:
    """Return every table of a suite of `benchmarks.suites`, whose result `run_suite` returned."""
    own = {"choice": _choice_tables, "mixture": _mixture_tables, "sampler": _sampler_tables}
    return own.get(result["suite"], benchmark_tables)(result)


def ops_summary(result: dict[str, Any]) -> TextTable:
    """Return one row per case: ours, and the fastest other method with the same results (the total too, if exact)."""
    header = ["case", "tikmix_fast", "fastest other", "extra memory", "of the other", "GF/s", "of peak", "error"]
    rows, slower = [], []
    for case in result["cases"]:
        ours, other = main_rows(case)
        if ours is None or other is None:
            rows.append([case["case"], "not available here", *["-"] * (len(header) - 2)])
            continue
        if other["ratio"] < ours["ratio"]:
            slower.append(case["case"])
        rows.append(
            [
                case["case"],
                ratio_text(ours),
                f"{other['ratio']:.2f} {other['method']}",
                bytes_text(ours["scratch_bytes"]),
                bytes_text(other["scratch_bytes"]),
                f"{ours['flops_per_second'] / 1e9:.0f}",
                f"{ours['peak_share']:.0%}",
                error_text(ours["error"]),
            ]
        )
    notes = [f"Slower than the fastest other: {'; '.join(slower)}"] if slower else []
    if any(case.get("projection") for case in result["cases"]):
        notes.append(
            "A projection counts as the dense product it stands for; a countsketch adds instead of multiplying"
        )
    return TextTable("Influence and total gradient of one layer", header, rows, notes)


def _choice_tables(result: dict[str, Any]) -> list[TextTable]:
    rows = []
    for case in result["cases"]:
        seconds = {way: case["seconds"][way] for way in ("fused", "row_wise")}
        share = seconds[case["chosen"]] / min(seconds.values())
        times = [f"{each * 1e3:.3g}" for each in seconds.values()]
        name = f"{case['dtype']}, {case['rows_per_domain']} rows per domain, n={case['tasks']}"
        rows.append([name, *times, case["chosen"].replace("_", "-"), f"{share:.2f}"])
    sizes = result["cases"][0]
    title = "Two ways, T={rows} O={height} I={width}, one thread".format(**sizes)
    header = ["case", "fused, ms", "row-wise, ms", "chosen", "over the best"]
    return [TextTable(title, header, rows)]


def _mixture_tables(result: dict[str, Any]) -> list[TextTable]:
    rows = [
        [f"{case['case']}, {row['method']}", f"{row['seconds'] * 1e3:.3g}", f"{row['objective_above_best']:.0e}"]
        for case in result["cases"]
        for row in case["rows"]
    ]
    notes = [f"{case['case']}: {note}" for case in result["cases"] for note in skipped_notes(case)]
    return [TextTable("TiKMiX-D", ["domains, tasks, solver", "ms", "objective above the best"], rows, notes)]


def _sampler_tables(result: dict[str, Any]) -> list[TextTable]:
    tables = []
    for case in result["cases"]:
        rows = [[row["method"], f"{row['draws_per_second']:.2e}"] for row in case["rows"]]
        tables.append(TextTable(f"Sampler, {case['case']}", ["draws", "per second"], rows))
        rows = [
            [f"{row['domains']} domains, {row['samples']:.0e} samples", bytes_text(row["peak_bytes"])]
            for row in case["memory"]
        ]
        tables.append(TextTable("Sampler, memory", ["a sampler that draws", "peak"], rows))
    return tables
