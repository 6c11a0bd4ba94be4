"""Watch the cross-entropy that the model calls, so that a wrong mask is an error and not a wrong scale."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SeenLosses", "watch_losses"]


@dataclass
class SeenLosses:
    """The target tokens of every cross-entropy seen in one forward: how many entered the loss."""

    counts: list[Tensor | int]
    reductions: list[str]

    @property
    def targets(self) -> int | None:
        """The number of targets that entered the loss, or None where it cannot be told.

        Several losses that each divided by their own count have no common one.
        """
        if not self.counts or (len(self.counts) > 1 and "mean" in self.reductions):
            return None
        return sum(int(count) for count in self.counts)


@contextmanager
def watch_losses() -> Iterator[SeenLosses]:
    """Count the targets of ``F.cross_entropy`` and ``F.nll_loss`` while the context is open.

    Losses inside a backward (recomputed by checkpointing), without gradient, or with class weights are not counted.
    """
    seen = SeenLosses([], [])
    originals = {name: getattr(F, name) for name in ("cross_entropy", "nll_loss")}

    def watched(name: str) -> Any:
        original = originals[name]

        def loss(input: Tensor, target: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1 and input.requires_grad:
                # Positional leftovers: size_average, ignore_index, reduce, reduction, ...
                ignored = args[1] if len(args) > 1 else kwargs.get("ignore_index", -100)
                reduction = args[3] if len(args) > 3 else kwargs.get("reduction", "mean")
                if weight is not None:
                    seen.reductions += ["mean", "mean"]
                    seen.counts += [0, 0]
                else:
                    classes_given = target.is_floating_point()
                    seen.counts.append(
                        target.numel() // max(input.shape[min(1, input.ndim - 1)], 1)
                        if classes_given
                        else (target.detach() != ignored).sum()
                    )
                    seen.reductions.append(reduction)
            return original(input, target, weight, *args, **kwargs)

        return loss

    try:
        for name in originals:
            setattr(F, name, watched(name))
        yield seen
    finally:
        for name, original in originals.items():
            setattr(F, name, original)
