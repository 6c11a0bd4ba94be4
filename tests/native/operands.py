"""Calls of the CUDA kernels with random numbers, as their tests on a CPU make them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["ELEMENTS", "RandomRows", "aligned_rows", "pack"]

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes as csrc/cuda/problem.h numbers them."""


def aligned_rows(rows: int, columns: int, dtype: torch.dtype, fill: float = math.nan, *, padding: int = 8) -> Tensor:
    """Return memory [rows, columns] whose rows begin at multiples of 16 bytes, as the CUDA kernels take them.

    ``fill`` is everywhere, also in the ``padding`` numbers or more between the rows, where nothing may be read.

    Examples
    --------
    >>> rows = aligned_rows(3, 5, torch.bfloat16)
    >>> rows.shape, rows.stride(), rows.data_ptr() % 16
    (torch.Size([3, 5]), (16, 1), 0)
    """
    stride = -(-columns // 8) * 8 + padding
    memory = torch.full((rows * stride + 16,), fill, dtype=dtype)
    skip = -memory.data_ptr() % 16 // memory.element_size()
    return memory[skip : skip + rows * stride].view(rows, stride)[:, :columns]


@dataclass
class RandomRows:
    """The rows of one call, drawn; ``random`` draws what else the call has."""

    height: int
    width: int
    offsets: list[int]
    tasks: int = 2
    splits: int = 1
    with_order: bool = False
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    rows: int = -1  # the last offset

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        if self.rows < 0:
            self.rows = self.offsets[-1]
        self.domains = len(self.offsets) - 1
        self.order = torch.randperm(self.rows, generator=self.random) if self.with_order else None
        self.grad_output, self.input = (
            aligned_rows(self.rows, columns, self.dtype).copy_(self.normal(self.rows, columns))
            for columns in (self.height, self.width)
        )

    def normal(self, *shape: int) -> Tensor:
        """Draw numbers."""
        return torch.randn(shape, generator=self.random)


def pack(finish: ModuleType, kernel: str, queries: Tensor, packed: Tensor, *, blocks: int) -> None:
    """Pack queries in so many blocks of the simulator; ``finish`` is the module of tests/native/finish.cpp."""
    finish.pack(
        *(kernel, queries.shape, queries.data_ptr(), ELEMENTS[queries.dtype], queries.stride()),
        *(packed.data_ptr(), ELEMENTS[packed.dtype], blocks),
    )
