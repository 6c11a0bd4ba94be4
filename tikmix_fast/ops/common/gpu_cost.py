"""Which way to the group influence of one layer costs less on a GPU, by counting. Both GPU backends use it.

*Fused* multiplies a tile of a domain's gradient with the queries while the tile is in registers, so it reads every
query tile once per domain. *Two-pass* writes the gradients of all domains, a panel at a time so that the panel stays in
the L2 cache. It then multiplies the panel with the queries, and reads each query once. The row products are the same.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["GpuCosts", "count_gpu_costs"]


class _Rates(NamedTuple):
    """Costs of an architecture, in seconds per operation or number."""

    product: float  # of a 16-bit matrix product on the tensor cores
    fused_number: float  # multiplying a number of a query tile with an accumulator
    panel_number: float  # writing a number of a panel, and reading it in the second pass
    launch: float  # of one more kernel


class GpuCosts(NamedTuple):
    """Predicted seconds of each way; only their order matters."""

    fused: float
    two_pass: float

    def cheapest(self) -> Literal["fused", "two_pass"]:
        """Return the name of the cheaper way. If they cost the same: fused, which needs no extra memory."""
        return "fused" if self.fused <= self.two_pass else "two_pass"


# By compute capability; an unknown one counts as the nearest older one. Predicted from rooflines, not measured: a tile
# of a query costs its bytes from L2 or its multiplications, whichever take longer (6 TB/s; the tensor cores multiply 16
# times as fast as the other units).
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
        T, O, I, m and n. Empty domains count, because the offsets stay on the device.
    with_total : bool
        Whether the caller wants the total gradient too. The two passes of the ``cuda`` backend are the vendor's and
        need one more product for it.
    kernel : {"triton", "cuda"}
        The backend.
    capability : tuple of int
        The device's compute capability, such as ``(9, 0)``.

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
