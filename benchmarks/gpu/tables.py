"""The results of ``python -m benchmarks.gpu`` as tables, for its own output and for the docs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tikmix_fast.report.benchmark_tables import TextTable, bytes_text, error_text, ratio_text

__all__ = ["gpu_bars", "gpu_facts", "gpu_tables", "is_passed"]

_OURS = "tikmix_fast"


def gpu_tables(result: dict[str, Any]) -> list[TextTable]:
    """Return every table of one device's results: the bars, tests, tools, ceilings, cases, steps."""
    parts = {name: part["jobs"] for name, part in result["parts"].items()}
    tables = [gpu_bars(result)]
    if "tests" in parts:
        tables += [_test_table(parts["tests"])]
    ops = parts.get("ops", {}).get("ops", {})
    if "ceilings" in ops:
        tables.append(_ceiling_table(ops["ceilings"]))
    tables += [_case_table(case) for case in ops.get("cases", [])]
    engine = parts.get("engine", {}).get("engine", {})
    tables += [_step_table(step) for step in engine.get("steps", [])]
    return [table for table in tables if table.rows]


def gpu_facts(result: dict[str, Any]) -> str:
    """Return one line: the machine of a result, with commit and date of every part."""
    device, environment = result.get("device", {}), result.get("environment", {})
    packages = environment.get("packages", {})
    parts = [
        f"{name} at {_commit(part['commit'])} on {part['date'][:10]}{'' if part['finished'] else ' (not finished)'}"
        for name, part in result["parts"].items()
    ]
    return (
        f"{device.get('name', 'unknown device')}, driver {device.get('driver_version', 'unknown')}, "
        f"torch {packages.get('torch', 'unknown')}, triton {packages.get('triton', 'unknown')}, "
        f"nvcc {environment.get('nvcc') or 'unknown'}; {'; '.join(parts) or 'no part was run'}"
    )


def _commit(commit: str | None) -> str:
    first, *rest = (commit or "an unknown commit").split()
    return " ".join([first[:10], *rest])


def is_passed(result: dict[str, Any], parts: Sequence[str]) -> bool:
    """Return whether these parts are finished without a failed test or a wrong answer, whatever their speed."""
    for name in parts:
        part = result["parts"].get(name)
        if part is None or not part["finished"]:
            return False
        for job in part["jobs"].values():
            if job.get("failed") or job.get("crashed") or job.get("wrong") or job.get("clean") is False:
                return False
            if any(each.get("wrong") for each in job.get("cases", [])):
                return False
            if any(each.get("failed") for each in job.get("steps", [])):
                return False
    return True


def gpu_bars(result: dict[str, Any]) -> TextTable:
    """Return one row per goal: the value of the automatic choice, and that of our best way."""
    parts = {name: part["jobs"] for name, part in result["parts"].items()}
    rows = []
    for case in parts.get("ops", {}).get("ops", {}).get("cases", []):
        if case["bar"] is not None:
            rows.append(_bar_row(case))
    for step in parts.get("engine", {}).get("engine", {}).get("steps", []):
        by_name = {row["method"]: row for row in step["rows"]}
        for name, (bar, aim) in step["bars"].items():
            row = by_name.get(name)
            reached = ratio_text(row) if row else "not available"
            verdict = _verdict(row["ratio"] if row else None, bar, aim)
            rows.append([f"training step {name}", "x plain step", f"{bar:g}", f"{aim:g}", reached, reached, verdict])
    header = ["case", "measure", "bar", "aim", "automatic", "best of ours", "verdict"]
    return TextTable("Goals", header, rows)


def _bar_row(case: dict[str, Any]) -> list[str]:
    measure = case["measure"]
    names = {"ratio": "x plain", "floor": "x its floor", "scratch": "memory besides"}
    ours = [row for row in case["rows"] if row["ours"] and (measure == "floor" or "total" in row["gives"])]

    def value(row: dict[str, Any]) -> float | None:
        number: float | None = row[{"ratio": "ratio", "floor": "floor_ratio", "scratch": "scratch_bytes"}[measure]]
        return number

    def text(row: dict[str, Any] | None) -> str:
        if row is None:
            return "not available"
        number = value(row)
        if measure == "ratio":
            shown = ratio_text(row)
        elif measure == "scratch":
            shown = bytes_text(row["scratch_bytes"])
        else:
            shown = f"{number:.2f}"
        return shown if row["method"] == _OURS else f"{shown} ({row['method'].removeprefix(f'{_OURS}, ')})"

    measured = [row for row in ours if value(row) is not None]
    best = min(measured, key=lambda row: value(row) or 0.0, default=None)
    automatic = next((row for row in measured if row["method"] == _OURS), best if measure == "floor" else None)
    limits = [bytes_text(int(case[each])) if measure == "scratch" else f"{case[each]:g}" for each in ("bar", "aim")]
    verdict = _verdict(None if automatic is None else value(automatic), case["bar"], case["aim"])
    return [case["case"], names[measure], *limits, text(automatic), text(best), verdict]


def _verdict(value: float | None, bar: float, aim: float) -> str:
    if value is None:
        return "not measured"
    return "aim" if value <= aim else "bar" if value <= bar else "missed"


def _test_table(jobs: dict[str, Any]) -> TextTable:
    rows, notes = [], []
    for name, job in jobs.items():
        if "passed" not in job:
            state = job.get("why_not") or {True: "clean", False: "errors found"}.get(job.get("clean"), "no result")
            rows.append([name, state, "-", "-", "-"])
            continue
        failed = job.get("failed", {})
        rows.append([name, "tests", str(job["passed"]), str(len(failed)), str(sum(job["skipped"].values()))])
        notes += [f"{test} failed" for test in list(failed)[:10]]
        if job.get("stopped"):
            notes.append(f"{name}: {job['stopped']} after {job['passed']} of {job.get('collected', 'its')} tests")
    return TextTable("Tests on the GPU", ["what", "", "passed", "failed", "skipped"], rows, notes)


def _ceiling_table(ceilings: dict[str, Any]) -> TextTable:
    rows = [["copy, read and written", f"{ceilings['bandwidth'] / 1e12:.2f} TB/s"]]
    rows += [[f"{name} product, 8192^3", f"{rate / 1e12:.0f} TFLOP/s"] for name, rate in ceilings["flops"].items()]
    l2 = ceilings["l2"]
    rows.append(["reads from L2", f"{l2 / 1e12:.2f} TB/s" if l2 else f"not measured: {ceilings['l2_why_not']}"])
    return TextTable("The machine's own limits", ["", "measured"], rows)


def _case_table(case: dict[str, Any]) -> TextTable:
    graph = any(row.get("graph") for row in case["rows"])
    header = ["method", "ms", "x plain [95 %]", "x floor", "TFLOP/s", "TB/s", "scratch", "error", "of total"]
    rows = []
    for row in case["rows"]:
        replayed = row.get("graph") or {}
        rows.append(
            [
                row["method"],
                f"{row['seconds'] * 1e3:.3g}",
                ratio_text(row),
                "-" if row["floor_ratio"] is None else f"{row['floor_ratio']:.2f}",
                f"{row['flops_per_second'] / 1e12:.3g} ({row['peak_share']:.0%})",
                f"{row['bytes_per_second'] / 1e12:.2g} ({row['bandwidth_share']:.0%})",
                bytes_text(row["scratch_bytes"]),
                error_text(row["error"]),
                error_text(row["total_error"]),
                *([_graph_text(replayed)] if graph else []),
            ]
        )
    clock = case["clocks"].get("clocks.sm")
    title = f"{case['case']}: {case['tokens_per_domain']:.0f} tokens per domain" + (
        f", {clock:.0f} MHz" if clock else ""
    )
    notes = [f"{name} left out: {reason}" for name, reason in case["skipped"].items()]
    notes += [f"{name} is WRONG: {reason}" for name, reason in case["wrong"].items()]
    bold = frozenset(index for index, row in enumerate(case["rows"]) if row["ours"])
    return TextTable(title, [*header, *(["from a graph"] if graph else [])], rows, notes, bold)


def _graph_text(replayed: dict[str, Any]) -> str:
    if "seconds" not in replayed:
        return "-"
    return f"{replayed['seconds'] * 1e3:.3g} ms, {ratio_text(replayed)}"


def _step_table(step: dict[str, Any]) -> TextTable:
    rows = [
        [
            row["method"],
            f"{row['seconds'] * 1e3:.4g}",
            ratio_text(row),
            bytes_text(row["step_bytes"]),
            bytes_text(row["held_bytes"]),
        ]
        for row in step["rows"]
    ]
    title = f"{step['case']}, {step['parameters'] / 1e6:.0f} million parameters"
    header = ["training step", "ms", "x without [95 %]", "memory of a step", "memory held"]
    bold = frozenset(index for index, row in enumerate(step["rows"]) if row["ours"])
    return TextTable(title, header, rows, [f"{name} failed: {why}" for name, why in step["failed"].items()], bold)
