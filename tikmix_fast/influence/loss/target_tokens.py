"""How many target tokens of each domain a batch has."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tikmix_fast.influence.capture.rows import RowLabels

__all__ = ["check_mask", "count_target_tokens", "masked_targets"]


def check_mask(mask: Tensor | int | None, labels: RowLabels) -> None:
    """Check a mask against the ids before the model runs.

    Raises
    ------
    TypeError
        If it is neither a bool tensor, an int, nor None.
    ValueError
        If its shape does not fit the ids, or a count is given for a batch of several domains.
    """
    if mask is None:
        return
    if isinstance(mask, int) and not isinstance(mask, bool):
        if mask < 0:
            raise ValueError(f"mask given as a number of target tokens must not be negative; got {mask}")
        if labels.batch is not None and labels.single is None:
            raise ValueError(
                "mask must be a bool tensor where a batch mixes domains: a count does not say whose tokens they are"
            )
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True where the logits enter the loss, or an int count; got {got}")
    ids = labels.ids
    if isinstance(ids, Tensor):
        fits = mask.shape == ids.shape if ids.ndim == 2 else mask.ndim in (1, 2) and mask.shape[0] == ids.shape[0]
        if not fits:
            raise ValueError(
                f"mask must have shape [B, S] with the ids of shape {list(ids.shape)}; got {list(mask.shape)}"
            )


def masked_targets(labels: RowLabels, mask: Tensor | int | None) -> list[Tensor]:
    """Return how many targets each id has (one number for a batch of one domain), on the mask's device, unread.

    Empty where there is no mask, or it is a count.
    """
    if not isinstance(mask, Tensor):
        return []
    if labels.single is not None:
        return [mask.sum()]
    ids = labels.ids
    return [mask if isinstance(ids, Tensor) and ids.ndim == 2 else mask.reshape(len(mask), -1).sum(1)]


def count_target_tokens(
    labels: RowLabels, mask: Tensor | int | None, rows: tuple[int, ...] | None, masked: Sequence[Tensor]
) -> NDArray[np.float64]:
    """Return the target tokens of each domain, float64 [m].

    Parameters
    ----------
    labels : RowLabels
    mask : bool [B, S] or [B], int, or None
        None: every row of the model's last product has a target.
    rows : tuple of int or None
        Leading dimensions of that product.
    masked : sequence of Tensor
        What `masked_targets` gave, read.

    Raises
    ------
    ValueError
        If there is no mask and the rows do not tell.
    """
    tokens = torch.zeros(labels.n_domains, dtype=torch.float64, device="cpu")
    if mask is None and rows is None:
        raise ValueError("mask must be given: the model ran no product whose rows could be counted")
    if labels.single is not None:
        if isinstance(mask, Tensor):
            tokens[labels.single] = float(masked[0])
        else:
            tokens[labels.single] = prod(rows or ()) if mask is None else mask
        return tokens.numpy()
    ids = labels.ids
    if not isinstance(ids, Tensor):
        raise TypeError("a batch of several domains has ids")
    if isinstance(mask, Tensor):
        per_id = masked[0]
    else:
        total, remainder = divmod(prod(rows or ()), ids.numel())
        if remainder or (ids.ndim == 2 and total != 1):
            raise ValueError(
                f"mask must be given: the model's last product has rows of shape {list(rows or ())}, which do not "
                f"match the ids of shape {list(ids.shape)}"
            )
        per_id = torch.full(ids.shape, float(total), dtype=torch.float64, device="cpu")
    return tokens.index_add_(0, ids.reshape(-1), per_id.reshape(-1)).numpy()
