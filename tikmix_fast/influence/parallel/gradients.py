"""Run a backward that leaves the gradients of the training run alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tikmix_fast.influence.parallel.fully_sharded import is_sharded

__all__ = ["GradientBefore", "gradients_set_aside", "local_gradients", "synchronises", "without_synchronisation"]


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
    """Give every parameter an empty ``.grad`` inside, and its old one (None included) back afterwards.

    Those of sharded parameters are `WholeGradients`' own to set aside.
    """
    kept = [(parameter, parameter.grad) for parameter in model.parameters() if not is_sharded(parameter)]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


@contextmanager
def without_synchronisation(model: nn.Module) -> Iterator[None]:
    """Keep DistributedDataParallel from talking to other ranks inside, which may make another number of passes."""
    wrapper = _data_parallel(model)
    if wrapper is None:
        yield
        return
    buffers = wrapper.require_forward_param_sync
    try:
        wrapper.require_forward_param_sync = False
        with wrapper.no_sync():
            yield
    finally:
        wrapper.require_forward_param_sync = buffers


def synchronises(model: nn.Module) -> bool:
    """Whether the next backward leaves the mean over several ranks in ``p.grad``."""
    wrapper = _data_parallel(model)
    return wrapper is not None and bool(wrapper.require_backward_grad_sync) and wrapper.process_group.size() > 1


@contextmanager
def local_gradients(parameters: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Collect by name what the backward inside adds to each parameter, before other ranks have a part in it."""
    collected: dict[str, Tensor] = {}

    def collect(name: str, gradient: Tensor) -> None:
        collected[name] = collected[name] + gradient if name in collected else gradient.detach().clone()

    with ExitStack() as stack:
        for name, parameter in parameters.items():
            stack.callback(parameter.register_hook(lambda gradient, name=name: collect(name, gradient)).remove)
        yield collected


def _data_parallel(model: nn.Module) -> DistributedDataParallel | None:
    wrapper = getattr(model, "_orig_mod", model)
    return wrapper if isinstance(wrapper, DistributedDataParallel) else None
