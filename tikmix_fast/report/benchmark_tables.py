"""Results of benchmarks as tables: the same cells for a terminal and for the documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "TextTable",
    "benchmark_facts",
    "benchmark_tables",
    "bytes_text",
    "error_text",
    "main_rows",
    "ratio_text",
    "skipped_notes",
]


@dataclass(frozen=True)
class TextTable:
    """A table of finished cells.

    Attributes
    ----------
    title : str
    header : sequence of str
    rows : sequence of sequence of str
        The first column is text, the others are numbers.
    notes : sequence of str
        What the table lacks, with the reason.
    bold : frozenset of int
        The rows of this package's own methods.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    bold: frozenset[int] = frozenset()

    def to_markdown(self) -> str:
        """Return the table without its title, and the notes below."""
        lines = [f"| {' | '.join(self.header)} |", f"|---|{'---:|' * (len(self.header) - 1)}"]
        for index, row in enumerate(self.rows):
            first = f"**{row[0]}**" if index in self.bold else row[0]
            lines.append(f"| {' | '.join([first, *row[1:]])} |")
        if self.notes:
            lines += ["", *(f"{note}." for note in self.notes)]
        return "\n".join(lines)

    def to_rich(self) -> Table:
        """Return the table for a terminal."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        notes = escape("; ".join(self.notes)) or None
        table = Table(title=escape(self.title), caption=notes, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
        for index, name in enumerate(self.header):
            table.add_column(escape(name), justify="right" if index else "left")
        for index, row in enumerate(self.rows):
            table.add_row(*map(escape, row), style="bold" if index in self.bold else None)
        return table


def benchmark_tables(result: dict[str, Any]) -> list[TextTable]:
    """Return every table of a suite of ``tikmix-fast bench``, whose result `run_suite` returned."""
    return _ops_tables(result) if result["suite"] == "ops" else _engine_tables(result)


def benchmark_facts(result: dict[str, Any]) -> str:
    """Return in one line the machine, versions, commit and date of a result."""
    machine, packages = result["environment"]["machine"], result["environment"]["packages"]
    commit = (result["environment"]["commit"] or "unknown").split()
    return (
        f"{machine['processor']}, {machine['threads']} threads, torch {packages['torch']}, commit "
        f"{' '.join([commit[0][:10], *commit[1:]])}, {result['date']}"
    )


def main_rows(case: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return our row of a case, and the fastest other row with the same results; None for a missing one."""
    ours = next((row for row in case["rows"] if row["method"] == case["main"]), None)
    if ours is None:
        return None, None
    others = [row for row in case["rows"] if not row["ours"] and row["gives"] == ours["gives"]]
    return ours, min(others, key=lambda row: row["seconds"], default=None)


def _ops_tables(result: dict[str, Any]) -> list[TextTable]:
    header = ["method", "ms", "x plain [95 %]", "GF/s", "GB/s", "scratch", "error", "of total"]
    tables = []
    for case in result["cases"]:
        rows = [
            [
                row["method"],
                f"{row['seconds'] * 1e3:.3g}",
                ratio_text(row),
                f"{row['flops_per_second'] / 1e9:.0f} ({row['peak_share']:.0%})",
                f"{row['bytes_per_second'] / 1e9:.2g} ({row['bandwidth_share']:.0%})",
                bytes_text(row["scratch_bytes"]),
                error_text(row["error"]),
                error_text(row["total_error"]),
            ]
            for row in case["rows"]
        ]
        title = f"{case['case']}: {case['tokens_per_domain']:.0f} tokens per domain, {case['threads']} threads"
        notes = [
            f"{row['method']}: projecting alone puts it off by {row['sampling_error']:.1%} of |q||g| (rms)"
            for row in case["rows"]
            if row["sampling_error"] is not None
        ]
        tables.append(TextTable(title, header, rows, [*notes, *skipped_notes(case)], _ours(case["rows"])))
    return tables


def _engine_tables(result: dict[str, Any]) -> list[TextTable]:
    tables = [
        TextTable(
            f"{case['case']}: error {error_text(case['error'])}, autograd's own {error_text(case['eager_error'])}",
            ["training step", "s", "x without [95 %]", "CPU s"],
            [[row["method"], *_times(row)] for row in case["rows"]],
            skipped_notes(case),
            _ours(case["rows"]),
        )
        for case in result["steps"]
    ]
    tables += [
        TextTable(
            case["case"],
            ["all influence", "s", "x floor [95 %]", "CPU s", "parameters", "error"],
            [[row["method"], *_times(row), row["covers"], error_text(row["error"])] for row in case["rows"]],
            skipped_notes(case),
            _ours(case["rows"]),
        )
        for case in result["measurements"]
    ]
    memory = result["memory"]
    if memory.get("rows") or memory.get("skipped"):
        tables.append(
            TextTable(
                f"Peak memory above model and data: {memory['case']}",
                ["domains", "method", "growth", "above the floor"],
                [
                    [
                        str(row["domains"]),
                        row["method"],
                        bytes_text(row["growth_bytes"]),
                        bytes_text(row["above_floor_bytes"]),
                    ]
                    for row in memory["rows"]
                ],
                skipped_notes(memory),
            )
        )
    return tables


def _ours(rows: Sequence[dict[str, Any]]) -> frozenset[int]:
    return frozenset(index for index, row in enumerate(rows) if row["ours"])


def skipped_notes(case: dict[str, Any]) -> list[str]:
    """Return a note for every method that could not run."""
    return [f"{name} left out: {reason}" for name, reason in case.get("skipped", {}).items()]


def _times(row: dict[str, Any]) -> list[str]:
    return [f"{row['seconds']:.3g}", ratio_text(row), f"{row['cpu_seconds']:.3g}"]


def ratio_text(row: dict[str, Any]) -> str:
    """Return a row's ratio, with its interval if that is known and not a point."""
    interval = row["ratio_interval"]
    if interval is None or interval[0] == interval[1]:  # too few rounds, or the reference itself
        return f"{row['ratio']:.2f}"
    return f"{row['ratio']:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def bytes_text(count: int | None) -> str:
    """Return a number of bytes in MiB, "-" for None."""
    return "-" if count is None else f"{count / 2**20:.3g} MiB"


def error_text(error: float | None) -> str:
    """Return an error with one digit, "-" for None."""
    if error is None:
        return "-"
    digits, _, exponent = f"{error:.0e}".partition("e")
    return "0" if error == 0 else f"{digits}e{int(exponent)}"
