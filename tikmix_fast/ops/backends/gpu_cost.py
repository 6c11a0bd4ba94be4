"""Which way to the group influence of one layer costs least on a GPU, by counting.

*Fused* takes the products of a tile with the queries while it is in registers, and so reads every query tile once per
domain. *Two-pass* writes every domain's gradient, a panel at a time so that it stays in the L2 cache, and multiplies
the panel with the queries, reading each once. Both multiply the same rows.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["GpuCosts", "count_gpu_costs"]


class _Rates(NamedTuple):
    """What an architecture does, in seconds per operation or byte."""

    product: float  # of a 16-bit matrix product on the tensor cores
    fused_number: float  # a number of a query tile that is multiplied with an accumulator
    panel_number: float  # a number of a panel that is written, and read again by the second pass
    launch: float  # of one more kernel


class GpuCosts(NamedTuple):
    """What each way costs, in seconds as predicted; only their order matters."""

    fused: float
    two_pass: float

    def cheapest(self) -> Literal["fused", "two_pass"]:
        """Return the name of the least; fused, which needs no memory besides, of equals."""
        return "fused" if self.fused <= self.two_pass else "two_pass"


# By compute capability; an unknown one is counted as the nearest older. Predicted from rooflines, not measured: a tile
# of a query costs the bytes that pass from L2 and the multiplications, whichever is slower (kernel notes: 6 TB/s; the
# tensor cores multiply 16 times as fast as the others).
_RATES = {
    (8, 0): _Rates(product=1 / 240e12, fused_number=1 / 1.0e12, panel_number=1 / 0.8e12, launch=4e-6),
    (8, 6): _Rates(product=1 / 120e12, fused_number=1 / 0.7e12, panel_number=1 / 0.4e12, launch=4e-6),
    (9, 0): _Rates(product=1 / 700e12, fused_number=1 / 2.5e12, panel_number=1 / 2.0e12, launch=3e-6),
    (10, 0): _Rates(product=1 / 1400e12, fused_number=1 / 3.5e12, panel_number=1 / 3.0e12, launch=3e-6),
}
# Triton's main loop against the vendor's, and ours.
_TRITON = 1.4


def count_gpu_costs(
    rows: int,
    height: int,
    width: int,
    domains: int,
    tasks: int,
    *,
    with_total: bool,
    kernel: Literal["triton", "cuda"],
    capability: tuple[int, int],
) -> GpuCosts:
    """Count what ``group_influence`` costs on a GPU.

    Parameters
    ----------
    rows, height, width, domains, tasks : int
        T, O, I, m and n. Empty domains count: the offsets stay on the device.
    with_total : bool
        Whether the total gradient is wanted besides. The two passes of the ``cuda`` backend, which are the vendor's,
        need a product of their own for it.
    kernel : {"triton", "cuda"}
        Whose.
    capability : tuple of int
        Of the device, such as ``(9, 0)``.

    Returns
    -------
    GpuCosts

    Examples
    --------
    >>> sizes = dict(rows=16384, height=4096, width=4096, tasks=9, with_total=False, capability=(9, 0))
    >>> [count_gpu_costs(domains=m, kernel="triton", **sizes).cheapest() for m in (1, 64)]
    ['fused', 'two_pass']
    """
    known = [each for each in _RATES if each <= capability]
    rates = _RATES[max(known)] if known else _RATES[min(_RATES)]
    weights = float(height * width)
    product = 2 * rows * weights * rates.product
    ours = product * (_TRITON if kernel == "triton" else 1.0)
    fused = ours + domains * tasks * weights * rates.fused_number
    vendor = product * (2.0 if with_total else 1.0)
    panel = (2 * domains + tasks) * weights * rates.panel_number
    two_pass = (ours if kernel == "triton" else vendor) + panel + 2 * rates.launch
    return GpuCosts(fused, two_pass)
