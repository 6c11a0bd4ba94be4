"""The highest rates of this machine, measured in the same run as the methods."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tikmix_fast import ops

__all__ = ["MachineRates", "measure_rates"]


@dataclass(frozen=True)
class MachineRates:
    """Measured limits of this machine, with the present threads of torch.

    Attributes
    ----------
    flops : dict of str to float
        Floating-point operations per second by dtype: the best of several matrix products that fit into the caches.
    found_by : dict of str to str
        The product that reached this rate, by dtype.
    bandwidth : float
        Bytes per second, read plus written, of a copy of arrays far larger than the caches.
    """

    flops: dict[str, float]
    found_by: dict[str, str]
    bandwidth: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def measure_rates(dtypes: tuple[str, ...] = ("float32", "bfloat16"), seconds: float = 3.0) -> MachineRates:
    """Measure the highest rates that this machine reaches; they are not calculated.

    Parameters
    ----------
    dtypes : tuple of str
        Names of torch dtypes.
    seconds : float
        Time of all measurements together.

    Notes
    -----
    The fastest run of each product counts, because other work on the machine only slows it. The candidates are torch's
    ``@``, oneDNN's product through the op of linear layers, and this package's kernel on one domain. Some may be far
    below the machine's limit for a dtype.
    """
    flops, found_by = {}, {}
    share = seconds / (len(dtypes) + 1)
    for dtype in dtypes:
        candidates = _products(getattr(torch, dtype))
        rates = {
            name: work / _fastest(run, share / len(candidates)) for name, (work, run) in candidates.items()
        }  # fmt: skip
        best = max(rates, key=rates.__getitem__)
        flops[dtype], found_by[dtype] = rates[best], best
    source = torch.zeros(1 << 26)  # 256 MiB
    target = torch.ones_like(source)
    copied = 2 * source.numel() * source.element_size()
    return MachineRates(flops, found_by, copied / _fastest(lambda: target.copy_(source), share))


def _products(dtype: torch.dtype) -> dict[str, tuple[float, Callable[[], object]]]:
    candidates: dict[str, tuple[float, Callable[[], object]]] = {}
    for size in (384, 768, 1536):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        candidates[f"torch @, {size}"] = 2.0 * size**3, _multiply(a, b)
        if _onednn_takes(a):
            candidates[f"oneDNN, {size}"] = 2.0 * size**3, _multiply_by_onednn(a, b)
    rows, width = 2048, 512
    a, b = (torch.randn(rows, width).to(dtype) for _ in range(2))
    queries, offsets = ops.pack_queries(torch.randn(1, width, width).to(dtype)), torch.tensor([0, rows])
    candidates["tikmix_fast, one domain"] = (
        2.0 * rows * width * width,
        lambda: ops.group_influence(a, b, offsets, queries),
    )
    return candidates


def _multiply(a: Tensor, b: Tensor) -> Callable[[], object]:
    return lambda: a @ b


def _multiply_by_onednn(a: Tensor, b: Tensor) -> Callable[[], object]:
    return lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def _onednn_takes(a: Tensor) -> bool:
    try:
        _multiply_by_onednn(a, a)()
    except (RuntimeError, AttributeError):  # a build without oneDNN, or a dtype that this processor does not support
        return False
    return True


def _fastest(run: Callable[[], object], seconds: float) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best
