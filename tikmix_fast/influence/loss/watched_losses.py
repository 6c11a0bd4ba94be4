"""Watch the cross-entropy that the model calls, so that a wrong mask or normalizer is an error, not a wrong scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tikmix_fast.influence.loss.cross_entropy_calls import intercept_losses
from tikmix_fast.influence.torch_private import in_backward

__all__ = ["WatchedLosses", "targets_and_weight", "watch_losses"]


@dataclass
class _Loss:
    """One call: the targets that count (or their number), the reduction, and the gradient of the result."""

    valid: Tensor | int
    reduction: str
    known: bool
    gradient: Tensor | None = None

    def summary(self) -> Tensor | None:
        """Return the number of targets, and the smallest and largest weight of a target in the minimised loss.

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
            never = weights.new_full((1,), float("inf"))  # the minimum of an empty set
            low = torch.cat([weights.where(counts, never), never]).amin()
            high = torch.cat([weights.where(counts, -never), -never]).amax()
            return torch.stack([counts.sum().double(), low, high])
        count = self.valid.sum().double() if isinstance(self.valid, Tensor) else gradient.new_tensor(self.valid)
        each = gradient / count if self.reduction == "mean" else gradient
        return torch.stack([count, each.reshape(()), each.reshape(())])


@dataclass
class WatchedLosses:
    """The cross-entropies of one forward, with their gradients once the backward has run."""

    losses: list[_Loss] = field(default_factory=list)

    def summaries(self) -> list[Tensor]:
        """Return the summary [3] of every loss, still on the device; empty if any is unknown."""
        summaries = [loss.summary() for loss in self.losses]
        known = [each for each in summaries if each is not None]
        return known if len(known) == len(summaries) else []


def targets_and_weight(summaries: Sequence[Tensor]) -> tuple[int, float] | None:
    """Return the number of target tokens in the loss, and their common weight; None if unknown.

    There is no common weight with class weights, or if weights differ between tokens. ``summaries`` are those of
    `WatchedLosses`, on the host.
    """
    bounds = [(count, low, high) for count, low, high in (each.tolist() for each in summaries) if count]
    if not bounds or not all(math.isfinite(low) and math.isfinite(high) for _, low, high in bounds):
        return None
    low, high = min(each[1] for each in bounds), max(each[2] for each in bounds)
    return (int(sum(each[0] for each in bounds)), high) if abs(high - low) <= 1e-3 * abs(high) else None


@contextmanager
def watch_losses() -> Iterator[WatchedLosses]:
    """Watch the calls of ``F.cross_entropy`` and ``F.nll_loss`` inside, in this thread.

    It ignores losses without gradient, and losses that checkpointing recomputes in a backward.
    """
    calls = WatchedLosses()

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
        # ``args`` continue with size_average, ignore_index, reduce, reduction, ...
        ignored = args[1] if len(args) > 1 else kwargs.get("ignore_index", -100)
        reduction = args[3] if len(args) > 3 else kwargs.get("reduction", "mean")
        if target.is_floating_point():
            valid: Tensor | int = target.numel() // max(input.shape[min(1, input.ndim - 1)], 1)
        else:
            valid = target.detach() != ignored
        loss = _Loss(valid, reduction, known=weight is None)
        calls.losses.append(loss)

        def store(gradient: Tensor) -> None:
            loss.gradient = gradient.detach()

        result.register_hook(store)
        return result

    with intercept_losses(watched):
        yield calls
