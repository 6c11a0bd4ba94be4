"""A kernel that reads an array again and again from the L2 cache, to measure the highest rate."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BLOCK", "read_often"]

BLOCK = 2048


@triton.jit  # type: ignore[untyped-decorator]
def _read(source, sums, blocks, passes, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for each in range(passes):
        block = (program + each * 37) % blocks  # another block each time: no multiprocessor keeps it
        total += tl.load(source + block * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg")
    tl.store(sums + program, tl.sum(total))


def read_often(source: Tensor, sums: Tensor, passes: int) -> int:
    """Let every program read ``passes`` blocks of the float32 array, and return the bytes that all read.

    Parameters
    ----------
    source : float32 Tensor
        Must have a multiple of `BLOCK` elements, and be smaller than the L2 cache.
    sums : float32 Tensor [programs]
        Output: the sum of what each program read. Without it, the compiler would drop the reads.
    passes : int
    """
    _read[(len(sums),)](source, sums, source.numel() // BLOCK, passes, BLOCK)
    return len(sums) * passes * BLOCK * source.element_size()
