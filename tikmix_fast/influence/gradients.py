"""Run a backward that leaves the gradients of the training run alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn

__all__ = ["GradientBefore", "gradients_set_aside", "without_synchronisation"]


class GradientBefore:
    """The gradient of a parameter before a backward: whether it was touched since, and, if copied, what it was."""

    def __init__(self, parameter: Tensor, copy: bool) -> None:
        self._gradient = parameter.grad
        self._version = -1 if parameter.grad is None else parameter.grad._version
        self._copy = parameter.grad.detach().clone() if copy and parameter.grad is not None else None

    def touched(self, parameter: Tensor) -> bool:
        """Whether a backward added to the gradient."""
        gradient = parameter.grad
        return gradient is not self._gradient or (gradient is not None and gradient._version != self._version)

    def kept(self, parameter: Tensor) -> Tensor | None:
        """Return the copy; None if there was no gradient, or if it was dropped since and another one begun."""
        return self._copy if parameter.grad is self._gradient else None


@contextmanager
def gradients_set_aside(model: nn.Module) -> Iterator[None]:
    """Give every parameter an empty ``.grad`` inside, and its old one (None included) back afterwards."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def without_synchronisation(model: nn.Module) -> AbstractContextManager[None]:
    """Keep DistributedDataParallel from reducing gradients inside."""
    no_sync = getattr(model, "no_sync", None)
    return no_sync() if callable(no_sync) else nullcontext()
