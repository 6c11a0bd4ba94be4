"""All that a pass must learn of the user's loss: target tokens, divisor, scale, and what the cross-entropy says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from torch import Tensor

from tikmix_fast.influence.capture.rows import RowLabels
from tikmix_fast.influence.loss.loss_scale import LossScale
from tikmix_fast.influence.loss.target_tokens import TargetCount
from tikmix_fast.influence.loss.watch import SeenLosses, targets_and_weight, watch_losses

__all__ = ["LossAccount"]


class LossAccount:
    """Learn the loss of one pass: `watch` it, hand `unread` to the device's next read, then `settle` and `check`.

    Parameters
    ----------
    labels : RowLabels
    mask, normalizer, scaler
        As in `InfluenceEngine.domains`.
    reduction : "mean" or "sum"

    Attributes
    ----------
    tokens : float64 [m]
        Target tokens of each domain, once settled.
    factor : float
        What turns the gradient that flowed into that of the summed token losses, once settled.
    """

    def __init__(
        self,
        labels: RowLabels,
        mask: Tensor | int | None,
        normalizer: float | None,
        scaler: Any,
        reduction: Literal["mean", "sum"],
    ) -> None:
        self._count = TargetCount(labels, mask)
        self._scale = LossScale(normalizer, scaler)
        self._reduction = reduction
        self._losses = SeenLosses()
        self._summaries: Sequence[Tensor] = ()
        self.tokens = np.zeros(labels.n_domains)
        self.factor = 1.0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note the cross-entropies that the model calls inside."""
        with watch_losses() as self._losses:
            yield

    def unread(self) -> dict[str, list[Tensor]]:
        """Return what still has to be read from the device."""
        return {"masked": self._count.unread(), "losses": self._losses.summaries(), "scale": [self._scale.unread]}

    def settle(self, readings: Mapping[str, Sequence[Tensor]], rows: tuple[int, ...] | None) -> None:
        """Take what `unread` gave, on the host, and the leading dimensions of the model's last product.

        Raises
        ------
        ValueError
            If there is no mask and the rows do not tell the target tokens.
        """
        self._summaries = readings["losses"]
        self.tokens = self._count.settle(readings["masked"], rows)
        self.factor = self._scale.factor(float(self.tokens.sum()), self._reduction, readings["scale"])

    def check(self) -> None:
        """Compare mask and normalizer with what the cross-entropy and its backward say.

        Raises
        ------
        ValueError
            If they disagree, or the batch has no target token.
        """
        counted = int(self.tokens.sum())
        if counted == 0:
            raise ValueError("the batch has no target token: check the mask")
        told = targets_and_weight(self._summaries)
        if told is None:
            return
        targets, weight = told
        if targets != counted:
            source = "the mask counts" if self._count.by_mask else "mask=None counts every position"
            raise ValueError(
                f"the cross-entropy had {targets} target tokens, but {source}: {counted}. Pass mask=, True where the "
                "logits enter the loss; tikmix_fast.shifted_mask(labels) makes it for models that shift labels "
                "themselves"
            )
        if weight <= 0 or abs(weight * self.factor - 1) > 1e-2:
            raise ValueError(
                "the backward says that the sum of token losses was divided by "
                f"{1 / weight if weight else float('inf'):.6g}, but reduction, normalizer and scaler say "
                f"{self.factor:.6g}: pass normalizer= what it was divided by (accumulation steps included), scaler= "
                "where a GradScaler scaled the loss, or reduction='sum'"
            )
