"""The divisor and the scale of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tikmix_fast.influence.torch_private import current_scale

__all__ = ["LossScale"]


class LossScale:
    """The factor from the gradient that flowed to the gradient of the summed token losses.

    Parameters
    ----------
    normalizer : float, optional
        The divisor of the sum of the token losses.
    scaler : torch.amp.GradScaler, optional

    Raises
    ------
    TypeError, ValueError
        If the normalizer is not a positive number, or the scaler not a GradScaler.
    """

    def __init__(self, normalizer: float | None, scaler: Any) -> None:
        if normalizer is not None:
            if isinstance(normalizer, Tensor):
                normalizer = float(normalizer)
            if not isinstance(normalizer, Real):
                raise TypeError(f"normalizer must be a number; got {type(normalizer).__name__}")
            if not (np.isfinite(float(normalizer)) and normalizer > 0):
                raise ValueError(f"normalizer must be a positive number; got {normalizer!r}")
        if scaler is not None and not callable(getattr(scaler, "get_scale", None)):
            raise TypeError(f"scaler must be a torch.amp.GradScaler; got {type(scaler).__name__}")
        self._normalizer = normalizer
        # Copy the scale now, because update() may change it. get_scale() would wait for the device.
        scale = current_scale(scaler)
        if scale is None:
            scale = torch.tensor(1.0 if scaler is None else float(scaler.get_scale()), device="cpu")
        self.unread = scale.to(torch.float64, copy=True)

    def factor(self, tokens: float, reduction: str, scale: Sequence[Tensor]) -> float:
        """Return the factor, given the target tokens and the scale on the host."""
        divisor = self._normalizer if self._normalizer is not None else (tokens if reduction == "mean" else 1.0)
        return float(divisor) / float(scale[0])
