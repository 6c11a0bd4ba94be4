"""Results of demonstrations as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table

from tikmix_fast.demo.results import DemoResult

__all__ = ["loss_table", "weight_table"]


def loss_table(results: Sequence[DemoResult]) -> Table:
    """Return the final loss of every task in both arms, steered tasks first, and the means of the two groups.

    Parameters
    ----------
    results : sequence of DemoResult
        One per seed, for the same tasks. The numbers of several are means over seeds; their change has its standard
        deviation over seeds.
    """
    several = f", mean of {len(results)} seeds" if len(results) > 1 else ""
    table = Table(title=f"Loss after training, nats per byte{several}")
    table.add_column("task")
    table.add_column("uniform", justify="right")
    table.add_column("TiKMiX-D", justify="right")
    table.add_column("change", justify="right")
    for title, tasks in (("steered for", results[0].steered), ("held out", results[0].held_out)):
        if not tasks:
            continue
        table.add_section()
        table.add_row(f"[bold]{title}[/]", end_section=False)
        for task in tasks:
            table.add_row(f"  {task}", *_cells(results, (task,)))
        table.add_row("  [bold]mean[/]", *(f"[bold]{cell}[/]" for cell in _cells(results, tasks)))
    return table


def weight_table(weights: Mapping[str, Mapping[str, float]]) -> Table:
    """Return mixtures side by side: one column per entry of ``weights``, one row per domain."""
    table = Table(title="Mixture")
    table.add_column("domain")
    for name in weights:
        table.add_column(name, justify="right")
    for domain in next(iter(weights.values())):
        table.add_row(domain, *(f"{each[domain]:.1%}" for each in weights.values()))
    return table


def _cells(results: Sequence[DemoResult], tasks: tuple[str, ...]) -> tuple[str, str, str]:
    theirs, ours = (
        np.array([np.mean([arm.final[task] for task in tasks]) for arm in arms])
        for arms in ([each.uniform for each in results], [each.tikmix for each in results])
    )
    change = 100 * (ours / theirs - 1)
    spread = f" ± {change.std(ddof=1):.1f}" if len(results) > 1 else ""
    colour = "green" if change.mean() < 0 else "red"
    return f"{theirs.mean():.3f}", f"{ours.mean():.3f}", f"[{colour}]{change.mean():+.1f}%{spread}[/]"
