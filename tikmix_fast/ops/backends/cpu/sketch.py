"""The native code of projections: the CountSketch of rows, and random words."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from tikmix_fast.ops.backends.cpu import cpu

with suppress(ImportError):  # cpu.unavailable says why
    from tikmix_fast import _cpu

__all__ = ["can_sketch", "sketch_rows", "write_random_words"]


def can_sketch(rows: Tensor, dim: int) -> bool:
    """Tell whether `sketch_rows` takes these rows and this number of rows of the matrix here."""
    drawn = 16 <= dim <= 1024 and dim.bit_count() == 1  # else the codes of a dense kind's lookup, which sketch nothing
    return drawn and cpu.unavailable() is None and rows.device.type == "cpu" and rows.dtype in cpu.DTYPE_CODES


def sketch_rows(rows: Tensor, codes: Tensor, dim: int) -> Tensor:
    """Take the CountSketch of every row.

    Parameters
    ----------
    rows : float32 | bfloat16 | float16 Tensor [T, columns]
    codes : int32 Tensor [columns]
        A factor of a `tikmix_fast.ops.LayerProjection`.
    dim : int
        A power of two from 16 to 1024.

    Returns
    -------
    float32 Tensor [T, dim]

    Raises
    ------
    ValueError
        If the codes are no block-permuted sketch to ``dim`` rows.
    """
    codes = codes.contiguous()
    output = rows.new_empty(rows.shape[0], dim, dtype=torch.float32)
    _cpu.sketch_rows(
        instruction_set=cpu.chosen_instruction_set(),
        threads=torch.get_num_threads(),
        sizes=(*rows.shape, dim),
        input=cpu.matrix_argument(rows),
        codes=codes.data_ptr(),
        output=output.data_ptr(),
    )
    return output


def write_random_words(seed: int, stream: int, first_row: int, words: Tensor) -> None:
    """Fill a contiguous int64 tensor [rows, columns, 4] as `tikmix_fast.ops.common.philox.random_words` says."""
    _cpu.random_words(seed=seed, stream=stream, place=(first_row, *words.shape[:2]), words=words.data_ptr())
