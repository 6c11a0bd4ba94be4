"""The measured cost of both ways to group influence on a grid of shapes, beside their counted cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tikmix_fast import ops
from tikmix_fast.benchmarking.interleaved import interleave
from tikmix_fast.ops.backends import cpu
from tikmix_fast.ops.backends.cpu.cost import count_costs
from tikmix_fast.ops.backends.cpu.exact import fused, row_wise
from tikmix_fast.ops.common.checks import Arguments
from tikmix_fast.testing import domain_gradients, influence_error

__all__ = ["GRID", "QUICK_GRID", "TINY_GRID", "measure_choice"]

GRID = [(512, 384, 512, rows, tasks) for rows in (1, 2, 4, 16, 64) for tasks in (1, 4, 9, 32)]
"""T, O, I, rows per domain, n."""

QUICK_GRID = [case for case in GRID if case[3] in (2, 16) and case[4] == 1]

TINY_GRID = [(32, 16, 24, 1, 1), (32, 16, 24, 16, 2)]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measure_choice(case: tuple[int, int, int, int, int], dtype: str, *, rounds: int = 5) -> dict[str, Any]:
    """Check both ways against float64, then time them in turn on one thread.

    Parameters
    ----------
    case : tuple of int
        T, O, I, rows per domain, n.
    dtype : "float32" or "bfloat16"
    rounds : int

    Returns
    -------
    dict
        Plain JSON types: the case; ``seconds`` (medians of CPU time) and ``counted`` (multiply-adds) of each way; the
        ``chosen`` way.

    Raises
    ------
    AssertionError
        If a way is wrong.
    """
    height, width = case[1:3]
    rows, per_domain, tasks = case[0], case[3], case[4]
    random = torch.Generator().manual_seed(0)
    input, grad_output, queries = (
        torch.randn(*shape, generator=random).to(_DTYPES[dtype])
        for shape in ((rows, width), (rows, height), (tasks, height, width))
    )
    offsets = torch.arange(0, rows + 1, per_domain)
    packed = ops.pack_queries(queries)
    arguments = Arguments(input, grad_output, offsets, queries, packed.panels, None, None)
    bounds = offsets.tolist()
    ways: dict[str, Callable[[], Tensor | None]] = {
        "fused": lambda: fused(arguments),
        "row_wise": lambda: row_wise(arguments, bounds),
    }
    gradients = domain_gradients(input, grad_output, offsets)
    right = torch.einsum("noi,moi->nm", queries.double(), gradients)
    for name, way in ways.items():
        values = way()
        error = None if values is None else influence_error(values, right, queries, gradients)
        if error is None or not error.error < 100 * torch.finfo(input.dtype).eps:
            raise AssertionError(f"{name} is wrong at {case}: {error}")
    pairs = dtype == "bfloat16" and cpu.instruction_sets()[0] == "avx512_bf16"
    counted = count_costs(rows, height, width, len(bounds) - 1, tasks, with_total=False, pairs=pairs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timings = interleave(ways, rounds=rounds)
    finally:
        torch.set_num_threads(threads)
    return {
        **dict(zip(("rows", "height", "width", "rows_per_domain", "tasks"), case, strict=True)),
        "dtype": dtype,
        "seconds": {name: timings.summary(name, "fused")["cpu_seconds"] for name in ways},
        "counted": {name: float(getattr(counted, name)) for name in ways},
        "chosen": min(ways, key=lambda name: float(getattr(counted, name))),
    }
