"""What the loss was divided and scaled by: undone, and compared with what the cross-entropy's backward says."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tikmix_fast.influence.loss.watch import targets_and_weight

__all__ = ["LossScale", "check_targets"]


class LossScale:
    """What the summed token losses were divided by, so that it can be undone."""

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
        # Taken before the step: update() may change the scale afterwards. get_scale() would wait for the device.
        scaled = getattr(scaler, "_scale", None)
        if not isinstance(scaled, Tensor):
            scaled = torch.tensor(1.0 if scaler is None else float(scaler.get_scale()), device="cpu")
        self.unread = scaled.to(torch.float64, copy=True)

    def factor(self, tokens: float, reduction: str, scale: Sequence[Tensor]) -> float:
        """Return by what to multiply, given the target tokens and the scale that was read."""
        divided = self._normalizer if self._normalizer is not None else (tokens if reduction == "mean" else 1.0)
        return float(divided) / float(scale[0])


def check_targets(
    tokens: NDArray[np.float64], factor: float, losses: Sequence[Tensor], mask: Tensor | int | None
) -> None:
    """Compare the mask and the normalizer with what the cross-entropy and its backward said."""
    counted = int(tokens.sum())
    if counted == 0:
        raise ValueError("the batch has no target token: check the mask")
    found = targets_and_weight(losses)
    if found is None:
        return
    targets, weight = found
    if targets != counted:
        source = "mask=None counts every position" if mask is None else "the mask counts"
        raise ValueError(
            f"the cross-entropy had {targets} target tokens, but {source}: {counted}. Pass mask=, True where the "
            "logits enter the loss; tikmix_fast.shifted_mask(labels) makes it for models that shift labels "
            "themselves"
        )
    if weight <= 0 or abs(weight * factor - 1) > 1e-2:
        raise ValueError(
            "the backward says that the sum of token losses was divided by "
            f"{1 / weight if weight else float('inf'):.6g}, but reduction, normalizer and scaler say {factor:.6g}: "
            "pass normalizer= what it was divided by (accumulation steps included), scaler= where a GradScaler "
            "scaled the loss, or reduction='sum'"
        )
