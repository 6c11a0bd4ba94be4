"""Run a backward that leaves the gradients of the training run alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn

__all__ = ["gradients_set_aside", "without_synchronisation"]


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
