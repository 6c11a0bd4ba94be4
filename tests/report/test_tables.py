"""Tables: every task has its row, and the numbers are those of the result."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from tikmix_fast.demo.results import ArmResult, DemoResult
from tikmix_fast.report.tables import loss_table, weight_table


def rows(table: Table) -> list[list[str]]:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(table)
    lines = capture.get().splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]


def test_every_task_has_its_row_and_each_group_its_mean(result: DemoResult) -> None:
    assert rows(loss_table([result])) == [
        ["steered for", "", "", ""],
        ["numpy docs", "2.500", "2.000", "-20.0%"],
        ["readmes", "2.500", "2.000", "-20.0%"],
        ["mean", "2.500", "2.000", "-20.0%"],
        ["held out", "", "", ""],
        ["sums", "2.500", "3.000", "+20.0%"],
        ["mean", "2.500", "3.000", "+20.0%"],
    ]


def test_several_seeds_give_means_with_their_spread(result: DemoResult) -> None:
    second = replace(result, tikmix=ArmResult(final={"numpy docs": 2.25, "readmes": 2.0, "sums": 3.0}))
    found = {row[0]: row[1:] for row in rows(loss_table([result, second]))}
    assert found["numpy docs"] == ["2.500", "2.125", "-15.0% ± 7.1"]
    assert found["readmes"] == ["2.500", "2.000", "-20.0% ± 0.0"]


def test_the_change_of_a_group_is_that_of_its_mean(result: DemoResult) -> None:
    result.tikmix.final["numpy docs"] = 1.0
    result.uniform.final["numpy docs"] = 1.5
    assert result.change(("numpy docs", "readmes")) == 3.0 / 4.0 - 1


def test_mixtures_stand_side_by_side() -> None:
    table = weight_table({"prior": {"web": 0.5, "code": 0.5}, "new": {"code": 0.75, "web": 0.25}})
    assert rows(table) == [["web", "50.0%", "25.0%"], ["code", "50.0%", "75.0%"]]
