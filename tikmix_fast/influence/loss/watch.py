"""Watch the cross-entropy that the model calls: a wrong mask or normalizer is an error, not a wrong scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tikmix_fast.influence.loss.intercept import intercept_losses
from tikmix_fast.influence.torch_private import in_backward

__all__ = ["SeenLosses", "targets_and_weight", "watch_losses"]


@dataclass
class _Loss:
    """One call: which targets count, how they were reduced, and the gradient that came back to the result."""

    valid: Tensor | int
    reduction: str
    known: bool
    gradient: Tensor | None = None

    def summary(self) -> Tensor | None:
        """Return the number of targets, and the least and the largest weight of a target in what was minimised.

        Float64 [3] on the loss's device, or None if unknown.
        """
        if self.gradient is None or not self.known:
            return None
        gradient = self.gradient.double()
        if self.reduction == "none":
            weights = gradient.reshape(-1)
            counts = weights != 0
            if isinstance(self.valid, Tensor):
                counts &= self.valid.reshape(-1)
            never = weights.new_full((1,), float("inf"))  # the minimum of nothing
            low = torch.cat([weights.where(counts, never), never]).amin()
            high = torch.cat([weights.where(counts, -never), -never]).amax()
            return torch.stack([counts.sum().double(), low, high])
        count = self.valid.sum().double() if isinstance(self.valid, Tensor) else gradient.new_tensor(self.valid)
        each = gradient / count if self.reduction == "mean" else gradient
        return torch.stack([count, each.reshape(()), each.reshape(())])


@dataclass
class SeenLosses:
    """The cross-entropies of one forward and what their backward said of each target token."""

    losses: list[_Loss] = field(default_factory=list)

    def summaries(self) -> list[Tensor]:
        """Return the summary [3] of every loss, still on the device; nothing if one of them is unknown."""
        summaries = [loss.summary() for loss in self.losses]
        known = [each for each in summaries if each is not None]
        return known if len(known) == len(summaries) else []


def targets_and_weight(summaries: Sequence[Tensor]) -> tuple[int, float] | None:
    """Return how many target tokens entered the loss, and their common weight; None if that is not known.

    Weights that differ between tokens, and class weights, leave no common one. ``summaries`` is what
    `SeenLosses.summaries` gave, on the host.
    """
    some = [(count, low, high) for count, low, high in (each.tolist() for each in summaries) if count]
    if not some or not all(map(math.isfinite, (bound for each in some for bound in each[1:]))):
        return None
    low, high = min(each[1] for each in some), max(each[2] for each in some)
    return (int(sum(each[0] for each in some)), high) if abs(high - low) <= 1e-3 * abs(high) else None


@contextmanager
def watch_losses() -> Iterator[SeenLosses]:
    """Note the targets of ``F.cross_entropy`` and ``F.nll_loss`` while the context is open, in this thread.

    Losses inside a backward (recomputed by checkpointing) or without gradient are not noted.
    """
    seen = SeenLosses()

    def watched(
        original: Callable[..., Any],
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        result = original(input, target, weight, *args, **kwargs)
        if in_backward() or not isinstance(result, Tensor) or not result.requires_grad:
            return result
        # Positional leftovers: size_average, ignore_index, reduce, reduction, ...
        ignored = args[1] if len(args) > 1 else kwargs.get("ignore_index", -100)
        reduction = args[3] if len(args) > 3 else kwargs.get("reduction", "mean")
        if target.is_floating_point():
            valid: Tensor | int = target.numel() // max(input.shape[min(1, input.ndim - 1)], 1)
        else:
            valid = target.detach() != ignored
        loss = _Loss(valid, reduction, known=weight is None)
        seen.losses.append(loss)

        def arrived(gradient: Tensor) -> None:
            loss.gradient = gradient.detach()

        result.register_hook(arrived)
        return result

    with intercept_losses(watched):
        yield seen
