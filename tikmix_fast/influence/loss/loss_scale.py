"""What the loss was divided and scaled by."""

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
    """The factor that turns a gradient that flowed into that of the summed token losses.

    Parameters
    ----------
    normalizer : float, optional
        What the sum of the token losses was divided by.
    scaler : torch.amp.GradScaler, optional

    Raises
    ------
    TypeError, ValueError
        If the normalizer is no positive number, or the scaler no GradScaler.
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
        # Read before the step, as update() may change the scale. get_scale() would wait for the device.
        scale = current_scale(scaler)
        if scale is None:
            scale = torch.tensor(1.0 if scaler is None else float(scaler.get_scale()), device="cpu")
        self.unread = scale.to(torch.float64, copy=True)

    def factor(self, tokens: float, reduction: str, scale: Sequence[Tensor]) -> float:
        """Return the factor, given the target tokens and the scale on the host."""
        divided = self._normalizer if self._normalizer is not None else (tokens if reduction == "mean" else 1.0)
        return float(divided) / float(scale[0])
