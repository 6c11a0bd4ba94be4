"""What a pass must know about the user's loss: its target tokens, divisor and scale, checked by the cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from torch import Tensor

from tikmix_fast.influence.capture.rows import RowLabels
from tikmix_fast.influence.loss.loss_scale import LossScale
from tikmix_fast.influence.loss.target_tokens import TargetCount
from tikmix_fast.influence.loss.watched_losses import WatchedLosses, targets_and_weight, watch_losses

__all__ = ["LossAccount"]


class LossAccount:
    """Learn about the loss of one pass: `watch` it, read `unread` from the device, then `settle` and `check`.

    Parameters
    ----------
    labels : RowLabels
    mask, normalizer, scaler
        As in `InfluenceEngine.domains`.
    reduction : "mean" or "sum"

    Attributes
    ----------
    tokens : float64 [m]
        Target tokens of each domain, after `settle`.
    factor : float
        The gradient that flowed times this is the gradient of the summed token losses, after `settle`.
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
        self._losses = WatchedLosses()
        self._summaries: Sequence[Tensor] = ()
        self.tokens = np.zeros(labels.n_domains)
        self.factor = 1.0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the cross-entropies that the model calls inside."""
        with watch_losses() as self._losses:
            yield

    def unread(self) -> dict[str, list[Tensor]]:
        """Return the tensors that must be read from the device before `settle`."""
        return {"masked": self._count.unread(), "losses": self._losses.summaries(), "scale": [self._scale.unread]}

    def settle(self, readings: Mapping[str, Sequence[Tensor]], rows: tuple[int, ...] | None) -> None:
        """Take the values of `unread`, on the host, and the leading dimensions of the model's last product.

        Raises
        ------
        ValueError
            If there is no mask and the number of target tokens does not follow from the rows.
        """
        self._summaries = readings["losses"]
        self.tokens = self._count.settle(readings["masked"], rows)
        self.factor = self._scale.factor(float(self.tokens.sum()), self._reduction, readings["scale"])

    def check(self) -> None:
        """Compare mask and normalizer with the cross-entropy and its backward.

        Raises
        ------
        ValueError
            If they disagree, or the batch has no target token.
        """
        count = int(self.tokens.sum())
        if count == 0:
            raise ValueError("the batch has no target token: check the mask")
        summary = targets_and_weight(self._summaries)
        if summary is None:
            return
        targets, weight = summary
        if targets != count:
            source = "the mask counts" if self._count.by_mask else "mask=None counts every position"
            raise ValueError(
                f"the cross-entropy had {targets} target tokens, but {source}: {count}. Pass mask=, True where the "
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
