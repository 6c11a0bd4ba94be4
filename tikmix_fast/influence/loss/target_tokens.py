"""Count the target tokens of each domain in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tikmix_fast.influence.capture.rows import RowLabels
from tikmix_fast.influence.loss.masks import check_mask

__all__ = ["TargetCount"]


class TargetCount:
    """Count the target tokens of each domain, by the mask or else by the rows of the model's last product.

    Parameters
    ----------
    labels : RowLabels
    mask : bool [B, S] or [B], int, or None
        None: every row of the model's last product has a target.

    Raises
    ------
    TypeError
        If the mask is neither a bool tensor, an int, nor None.
    ValueError
        If its shape does not fit the ids, or it is a count and the batch has several domains.
    """

    def __init__(self, labels: RowLabels, mask: Tensor | int | None) -> None:
        check_mask(mask, labels)
        self._labels, self._mask = labels, mask

    @property
    def by_mask(self) -> bool:
        """Whether the user gave a mask or a count."""
        return self._mask is not None

    def unread(self) -> list[Tensor]:
        """Return the targets of each id (one number for a batch of one domain), on the mask's device.

        Empty if there is no mask, or it is a count.
        """
        mask, ids = self._mask, self._labels.ids
        if not isinstance(mask, Tensor):
            return []
        if self._labels.single is not None:
            return [mask.sum()]
        return [mask if isinstance(ids, Tensor) and ids.ndim == 2 else mask.reshape(len(mask), -1).sum(1)]

    def settle(self, readings: Sequence[Tensor], rows: tuple[int, ...] | None) -> NDArray[np.float64]:
        """Return the target tokens of each domain, float64 [m].

        Parameters
        ----------
        readings : sequence of Tensor
            The values of `unread`, on the host.
        rows : tuple of int or None
            Leading dimensions of the model's last product.

        Raises
        ------
        ValueError
            If there is no mask, and the number does not follow from the rows.
        """
        labels, mask, ids = self._labels, self._mask, self._labels.ids
        if mask is None and rows is None:
            raise ValueError("mask must be given: the model ran no product whose rows could be counted")
        tokens = torch.zeros(labels.n_domains, dtype=torch.float64, device="cpu")
        if labels.single is not None:
            if isinstance(mask, Tensor):
                tokens[labels.single] = float(readings[0])
            else:
                tokens[labels.single] = prod(rows or ()) if mask is None else mask
            return tokens.numpy()
        if not isinstance(ids, Tensor):
            raise TypeError("a batch of several domains has ids")
        if isinstance(mask, Tensor):
            per_id = readings[0]
        else:
            total, remainder = divmod(prod(rows or ()), ids.numel())
            if remainder or (ids.ndim == 2 and total != 1):
                raise ValueError(
                    f"mask must be given: the model's last product has rows of shape {list(rows or ())}, which do not "
                    f"match the ids of shape {list(ids.shape)}"
                )
            per_id = torch.full(ids.shape, float(total), dtype=torch.float64, device="cpu")
        return tokens.index_add_(0, ids.reshape(-1), per_id.reshape(-1)).numpy()
