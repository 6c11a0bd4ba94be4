"""The ways in which a tensor may lie in memory, with NaN between its numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["contiguous", "every_other_column", "every_third_row", "padded_rows", "transposed", "unaligned"]


def _filled(tensor: Tensor, *shape: int) -> Tensor:
    return torch.full(shape, math.nan, dtype=tensor.dtype, device=tensor.device)


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


def every_other_column(tensor: Tensor) -> Tensor:
    wide = _filled(tensor, *tensor.shape[:-1], 2 * tensor.shape[-1])
    wide[..., ::2] = tensor
    return wide[..., ::2]


def every_third_row(tensor: Tensor) -> Tensor:
    *leading, rows, columns = tensor.shape
    tall = _filled(tensor, *leading, 3 * rows, columns)
    tall[..., 1::3, :] = tensor
    return tall[..., 1::3, :]


def padded_rows(tensor: Tensor) -> Tensor:
    columns = tensor.shape[-1]
    wide = _filled(tensor, *tensor.shape[:-1], 16 * (columns // 16 + 1))
    wide[..., :columns] = tensor
    return wide[..., :columns]


def unaligned(tensor: Tensor) -> Tensor:
    padded = _filled(tensor, tensor.numel() + 1)
    padded[1:] = tensor.flatten()
    return padded[1:].view(tensor.shape)
