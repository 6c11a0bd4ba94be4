"""Watch the cross-entropy that the model calls: a wrong mask or normalizer is an error then, not a wrong scale."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SeenLosses", "watch_losses"]


@dataclass
class _Loss:
    """One call: which targets are not ignored, how they were reduced, and the gradient that came back to the result."""

    valid: Tensor | int
    reduction: str
    known: bool
    gradient: Tensor | None = None

    def token_weights(self) -> Tensor | None:
        """Return with what weight the loss of each target entered what was minimised, or None if unknown."""
        if self.gradient is None or not self.known:
            return None
        if self.reduction == "none":
            weights = self.gradient.reshape(-1)
            if isinstance(self.valid, Tensor):
                weights = weights[self.valid.reshape(-1)]
            return weights[weights != 0].double()
        count = int(self.valid.sum()) if isinstance(self.valid, Tensor) else self.valid
        each = self.gradient.double() / (count if self.reduction == "mean" else 1)
        return each.expand(count)


@dataclass
class SeenLosses:
    """The cross-entropies of one forward and what their backward said of each target token."""

    losses: list[_Loss] = field(default_factory=list)

    def targets_and_weight(self) -> tuple[int, float] | None:
        """Return how many target tokens entered the loss and with what common weight, or None where it cannot be told.

        With weights that differ between tokens, or class weights, there is no common one.
        """
        found = [loss.token_weights() for loss in self.losses]
        known = [weights for weights in found if weights is not None]
        if not known or len(known) < len(found):
            return None
        weights = torch.cat(known)
        if not len(weights) or not bool(torch.isfinite(weights).all()):
            return None
        low, high = (float(bound) for bound in torch.aminmax(weights))
        return (len(weights), high) if abs(high - low) <= 1e-3 * abs(high) else None


@contextmanager
def watch_losses() -> Iterator[SeenLosses]:
    """Note the targets of ``F.cross_entropy`` and ``F.nll_loss`` while the context is open, in this thread.

    Losses inside a backward (recomputed by checkpointing) or without gradient are not noted.
    """
    seen = SeenLosses()
    thread = threading.get_ident()
    originals = {name: getattr(F, name) for name in ("cross_entropy", "nll_loss")}

    def watched(name: str) -> Any:
        original = originals[name]

        def loss(input: Tensor, target: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            result = original(input, target, weight, *args, **kwargs)
            mine = threading.get_ident() == thread and torch._C._current_graph_task_id() == -1
            if mine and isinstance(result, Tensor) and result.requires_grad:
                # Positional leftovers: size_average, ignore_index, reduce, reduction, ...
                ignored = args[1] if len(args) > 1 else kwargs.get("ignore_index", -100)
                reduction = args[3] if len(args) > 3 else kwargs.get("reduction", "mean")
                if target.is_floating_point():
                    valid: Tensor | int = target.numel() // max(input.shape[min(1, input.ndim - 1)], 1)
                else:
                    valid = target.detach() != ignored
                noted = _Loss(valid, reduction, known=weight is None)
                seen.losses.append(noted)

                def arrived(gradient: Tensor) -> None:
                    noted.gradient = gradient.detach()

                result.register_hook(arrived)
            return result

        return loss

    try:
        for name in originals:
            setattr(F, name, watched(name))
        yield seen
    finally:
        for name, original in originals.items():
            setattr(F, name, original)
