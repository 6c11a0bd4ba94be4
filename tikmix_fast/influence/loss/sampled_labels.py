"""Replace the data's labels in the model's cross-entropy by labels sampled from the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tikmix_fast.influence.capture.views import ParameterView
from tikmix_fast.influence.loss.cross_entropy_calls import intercept_losses
from tikmix_fast.influence.torch_private import in_backward

__all__ = ["SampledLosses", "draw_labels", "sampled_labels"]


@dataclass
class SampledLosses:
    """The number of calls, and per backward the number of targets with a gradient, still on the device."""

    calls: int = 0
    counts: list[Tensor] = field(default_factory=list)

    def tokens(self) -> int:
        """Return the number of target tokens with a gradient."""
        return sum(int(count) for count in self.counts)


def draw_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one label per position from softmax(logits); classes are in dimension 1, or the only one.

    Examples
    --------
    >>> certain = torch.tensor([[0.0, 100.0], [100.0, 0.0]])
    >>> draw_labels(certain, torch.Generator().manual_seed(0))
    tensor([1, 0])
    """
    scores = logits.detach().movedim(min(1, logits.ndim - 1), -1)
    likely = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    # torch.multinomial draws in the same way, but on a GPU it kills the process if a logit is not finite.
    return likely.div_(torch.empty_like(likely).exponential_(generator=generator)).argmax(-1)


@contextmanager
def sampled_labels(generator: Callable[[torch.device], torch.Generator]) -> Iterator[SampledLosses]:
    """Make ``F.cross_entropy`` and ``F.nll_loss`` compare with sampled labels inside.

    Positions whose label the data ignores stay ignored. In the backward, every target that the loss depends on gets
    weight one, whatever factor follows the loss: the gradient of the *sum* of the token losses flows.
    """
    losses = SampledLosses()

    def sampled(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        logits, target = arguments["input"], arguments["target"]
        differentiable = torch.is_grad_enabled() and isinstance(logits, Tensor) and logits.requires_grad
        # The backward refuses logits that met no data.
        if not differentiable or isinstance(logits, ParameterView):
            return original(*args, **kwargs)
        _refuse(original.__name__, arguments)
        if target.is_floating_point():
            valid = torch.ones_like(logits.select(min(1, logits.ndim - 1), 0), dtype=torch.bool)
        else:
            valid = target != arguments["ignore_index"]
        ignored = -100
        labels = draw_labels(logits, generator(logits.device)).masked_fill_(~valid, ignored)
        each = original(logits, labels, ignore_index=ignored, reduction="none")
        losses.calls += 1
        loss: Tensor = _UnitWeight.apply(each, valid, arguments["reduction"], losses)  # type: ignore[no-untyped-call]
        return loss

    with intercept_losses(sampled):
        yield losses


def _refuse(name: str, arguments: dict[str, Any]) -> None:
    if in_backward():
        raise RuntimeError(
            f"{name} is recomputed inside the backward (activation checkpointing of the loss): its labels cannot be "
            "sampled; leave the loss out of the checkpoint while the Fisher is fitted"
        )
    if arguments.get("weight") is not None:
        raise ValueError(f"{name} has class weights, for which labels cannot be sampled from the model: leave them out")
    if arguments.get("size_average") is not None or arguments.get("reduce") is not None:
        raise ValueError(f"{name} is called with size_average or reduce, which torch deprecates: use reduction=")


class _UnitWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, each: Tensor, valid: Tensor, reduction: str, losses: SampledLosses) -> Tensor:
        ctx.save_for_backward(valid)
        ctx.losses, ctx.dtype = losses, each.dtype
        if reduction == "none":
            return each.clone()
        return each.sum() / valid.sum() if reduction == "mean" else each.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (valid,) = ctx.saved_tensors
        targets = valid & (gradient != 0)
        ctx.losses.counts.append(targets.sum())
        return targets.to(ctx.dtype), None, None, None
