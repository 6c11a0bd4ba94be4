"""Put labels sampled from the model in the place of the data's, where the model calls its cross-entropy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tikmix_fast.influence.capture.views import ParameterView
from tikmix_fast.influence.loss.intercept import intercept_losses
from tikmix_fast.influence.torch_private import in_backward

__all__ = ["SampledLosses", "draw_labels", "sampled_labels"]


@dataclass
class SampledLosses:
    """What became of the sampled losses: how many targets had a gradient, one number per backward, unread."""

    calls: int = 0
    counts: list[Tensor] = field(default_factory=list)

    def tokens(self) -> int:
        """Return how many target tokens had a gradient."""
        return sum(int(count) for count in self.counts)


def draw_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return one label per position drawn from softmax(logits), classes in dimension 1 (or the only one).

    Examples
    --------
    >>> certain = torch.tensor([[0.0, 100.0], [100.0, 0.0]])
    >>> draw_labels(certain, torch.Generator().manual_seed(0))
    tensor([1, 0])
    """
    scores = logits.detach().movedim(min(1, logits.ndim - 1), -1)
    likely = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    # As torch.multinomial does inside, which on a GPU ends the process where a logit is not finite.
    return likely.div_(torch.empty_like(likely).exponential_(generator=generator)).argmax(-1)


@contextmanager
def sampled_labels(generator: Callable[[torch.device], torch.Generator]) -> Iterator[SampledLosses]:
    """Make ``F.cross_entropy`` and ``F.nll_loss`` compare with sampled labels while the context is open.

    Where the data's label is ignored, the sampled one is. Whatever the loss is multiplied with afterwards, every target
    that it depends on gets weight one in the backward: what flows is the gradient of the *sum* of the token losses.
    """
    seen = SampledLosses()

    def sampled(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(*args, **kwargs)
        given.apply_defaults()
        logits, target = given.arguments["input"], given.arguments["target"]
        differentiable = torch.is_grad_enabled() and isinstance(logits, Tensor) and logits.requires_grad
        # Logits that met no data are refused in the backward.
        if not differentiable or isinstance(logits, ParameterView):
            return original(*args, **kwargs)
        _refuse(original.__name__, given.arguments)
        if target.is_floating_point():
            valid = torch.ones_like(logits.select(min(1, logits.ndim - 1), 0), dtype=torch.bool)
        else:
            valid = target != given.arguments["ignore_index"]
        ignored = -100
        labels = draw_labels(logits, generator(logits.device)).masked_fill_(~valid, ignored)
        each = original(logits, labels, ignore_index=ignored, reduction="none")
        seen.calls += 1
        loss: Tensor = _UnitWeight.apply(each, valid, given.arguments["reduction"], seen)  # type: ignore[no-untyped-call]
        return loss

    with intercept_losses(sampled):
        yield seen


def _refuse(name: str, given: dict[str, Any]) -> None:
    if in_backward():
        raise RuntimeError(
            f"{name} is recomputed inside the backward (activation checkpointing of the loss): its labels cannot be "
            "sampled; leave the loss out of the checkpoint while the Fisher is fitted"
        )
    if given.get("weight") is not None:
        raise ValueError(f"{name} has class weights, for which labels cannot be sampled from the model: leave them out")
    if given.get("size_average") is not None or given.get("reduce") is not None:
        raise ValueError(f"{name} is called with size_average or reduce, which torch deprecates: use reduction=")


class _UnitWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, each: Tensor, valid: Tensor, reduction: str, seen: SampledLosses) -> Tensor:
        ctx.save_for_backward(valid)
        ctx.seen, ctx.dtype = seen, each.dtype
        if reduction == "none":
            return each.clone()
        return each.sum() / valid.sum() if reduction == "mean" else each.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (valid,) = ctx.saved_tensors
        used = valid & (gradient != 0)
        ctx.seen.counts.append(used.sum())
        return used.to(ctx.dtype), None, None, None
