"""Which way to the group influence of one layer costs less on a CPU, by counting.

*Fused* forms every domain's gradient tile by tile and multiplies a tile with the queries while it is in registers.
*Row-wise* never forms a gradient: ``<q, dy x^T> = <dy, q x>``, one product with every query per row, summed by domain.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Costs", "count_costs"]

# The unit is one row of the fused main loop: 24 vector instructions for a micro-tile of 24 vectors. With pairs, two
# bfloat16 rows are multiplied at a time: a row is cheaper, so the same work counts for more rows.
_DOMAIN = 3.0  # adding a micro-tile to the total: 24 loads, additions and stores; and the start of the next one
_DOMAIN_PAIRS = 6.0
_PRODUCT = 0.8  # 24 multiplications with a query (12 where pairs are multiplied), and the sum of the lanes
_PRODUCT_PAIRS = 1.0
# The same where the queries of a micro-tile, 1.5 KiB each, do not stay in the L1 cache beside the rows.
_PRODUCT_FROM_L2 = 1.5
_MOST_TASKS_IN_L1 = 16
# torch's float32 matrix product against our main loop, and one more read of its result.
_TORCH = 1.45
_TORCH_PAIRS = 3.2


class Costs(NamedTuple):
    """What each way costs, in multiply-adds of the fused main loop."""

    fused: float
    row_wise: float

    def cheapest(self) -> str:
        """Return the name of the cheaper way; fused if they cost the same."""
        return "row_wise" if self.row_wise < self.fused else "fused"


def count_costs(
    rows: int, height: int, width: int, domains: int, tasks: int, *, with_total: bool, pairs: bool
) -> Costs:
    """Count what ``group_influence`` costs on a CPU.

    Parameters
    ----------
    rows, height, width : int
        T, O and I.
    domains, tasks : int
        m, without empty domains, and n.
    with_total : bool
        Whether the caller wants the total gradient too. Fused computes it in any case.
    pairs : bool
        Whether two bfloat16 rows are multiplied at a time.

    Examples
    --------
    >>> count_costs(4096, 1024, 1024, 8, 4, with_total=True, pairs=False).cheapest()
    'fused'
    >>> count_costs(4096, 1024, 1024, 4096, 1, with_total=False, pairs=False).cheapest()
    'row_wise'
    """
    weights = float(height * width)
    in_l1 = _PRODUCT if tasks <= _MOST_TASKS_IN_L1 else _PRODUCT_FROM_L2
    domain, product, by_torch = (_DOMAIN_PAIRS, _PRODUCT_PAIRS, _TORCH_PAIRS) if pairs else (_DOMAIN, in_l1, _TORCH)
    fused = rows + domains * (domain + product * tasks)
    row_wise = rows * (by_torch * tasks + with_total)
    return Costs(weights * fused, weights * row_wise)
