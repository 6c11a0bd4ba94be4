"""The highest rates of a GPU, measured in the same run as the kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.device import Device
from benchmarks.gpu.progress import in_one_line
from benchmarks.gpu.timing import time_in_turn

__all__ = ["measure_ceilings"]


def measure_ceilings(device: Device, *, gemm: int = 8192, copied: int = 1 << 31, rounds: int = 20) -> dict[str, Any]:
    """Measure the rates of a copy, of matrix products and of the L2 cache, all on random data.

    Parameters
    ----------
    device : Device
    gemm : int
        Height and width of the matrices.
    copied : int
        Bytes of the array to copy.
    rounds : int

    Returns
    -------
    dict
        Plain JSON types: ``bandwidth`` (bytes read and written per second by a copy), ``flops`` by dtype, ``l2`` (bytes
        read per second) or None, ``l2_why_not``, ``clocks``.
    """
    where = device.where

    def seconds(run: Callable[[], object]) -> float:
        return float(time_in_turn(device, {"": [run]}, rounds=rounds, seconds=4).summary("", "")["seconds"])

    with device.watch_clocks() as clocks:
        source = torch.randn(copied // 4, device=where)
        target = torch.empty_like(source)
        bandwidth = 2 * source.nbytes / seconds(partial(target.copy_, source))
        del source, target
        flops = {}
        for name in ("bfloat16", "float16", "float32"):
            a, b = (torch.randn(gemm, gemm, device=where).to(getattr(torch, name)) for _ in range(2))
            out = torch.empty_like(a)
            flops[name] = 2.0 * gemm**3 / seconds(partial(torch.mm, a, b, out=out))
        l2, why_not = _measure_l2(device, seconds)
    return {"bandwidth": bandwidth, "flops": flops, "l2": l2, "l2_why_not": why_not, "clocks": clocks}


def _measure_l2(device: Device, seconds: Callable[[Callable[[], object]], float]) -> tuple[float | None, str | None]:
    try:
        from benchmarks.gpu.l2 import BLOCK, read_often

        # Both halves of the L2 of an H100 or H200 may keep a copy: a quarter fits in any case.
        source = torch.randn(max(device.cache_bytes // 4 // (4 * BLOCK), 1) * BLOCK, device=device.where)
        multiprocessors = device.describe().get("multiprocessors", 1)
        sums = torch.empty(8 * multiprocessors, device=device.where)
        passes = 256 if device.where.type == "cuda" else 2  # Triton's interpreter takes long
        moved = read_often(source, sums, passes)
        return moved / seconds(lambda: read_often(source, sums, passes)), None
    except Exception as error:  # a machine without a working Triton has the other numbers
        return None, in_one_line(error)
