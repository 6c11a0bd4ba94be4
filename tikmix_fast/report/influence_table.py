"""An influence matrix as a table for a terminal."""

from __future__ import annotations

import numpy as np
from rich.markup import escape
from rich.table import Table

from tikmix_fast.matrix.influence_matrix import InfluenceMatrix

__all__ = ["influence_table"]


def influence_table(matrix: InfluenceMatrix) -> Table:
    """Return one row per domain and one column per task: influence, standard error, and a star if it is not zero.

    `InfluenceMatrix.significant` decides over all cells together (Benjamini and Hochberg).
    """
    table = Table(
        title="Group Influence: positive lowers the task's loss",
        caption="* differs from zero (95 %, Benjamini-Hochberg over all cells); ± standard error; ? not measured",
    )
    table.add_column("domain")
    for task in matrix.tasks:
        table.add_column(escape(task), justify="right")
    significant = matrix.significant(correction="bh")
    for j, domain in enumerate(matrix.domains):
        cells = []
        for i in range(len(matrix.tasks)):
            value, error = matrix.values[i, j], matrix.stderr[i, j]
            star = "*" if significant[i, j] else " "
            spread = f" ± {error:.1e}" if np.isfinite(error) else ""
            cells.append("?" if np.isnan(value) else f"{value:+.2e}{spread}{star}")
        table.add_row(escape(domain), *cells)
    return table
