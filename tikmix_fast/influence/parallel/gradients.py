"""The gradients of one backward, apart from those that the training run has accumulated so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tikmix_fast.influence.parallel.fully_sharded import ShardedGradients, is_sharded
from tikmix_fast.influence.torch_private import uncompiled

__all__ = ["PassGradients", "gradients_set_aside", "without_synchronisation"]


class PassGradients:
    """What the backward of one pass adds to each parameter.

    Parameters
    ----------
    model : nn.Module
    parameters : mapping of str to Tensor
        The parameters to follow, whole or sharded.
    take : bool
        Take the gradients away: ``p.grad`` is afterwards what it was, None included, and ranks do not synchronise.
        Otherwise the backward is the ordinary one.
    keep : bool
        Keep the values of an ordinary backward, for `change`; otherwise only the touched parameters are known. Costs a
        copy of every gradient that was there before.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor], *, take: bool, keep: bool) -> None:
        self._model, self._take = model, take
        self._whole = {name: p for name, p in parameters.items() if not is_sharded(p)}
        self._sharded = ShardedGradients(parameters, take=take, keep=keep)
        # The mean over ranks that DistributedDataParallel leaves in p.grad is not what this backward added.
        self._reduced = keep and not take and _synchronises(model)
        self._local: dict[str, Tensor] = {}
        self._before = {name: _Before(p, keep and not take and not self._reduced) for name, p in self._whole.items()}

    @contextmanager
    def open(self) -> Iterator[PassGradients]:
        """Follow the gradients from here on."""
        with ExitStack() as stack:
            stack.enter_context(self._sharded.open())
            if self._take:
                stack.enter_context(gradients_set_aside(self._model))
                stack.enter_context(without_synchronisation(self._model))
            elif self._reduced:
                for name, parameter in self._whole.items():
                    hook = parameter.register_hook(lambda gradient, name=name: self._collect(name, gradient))
                    stack.callback(hook.remove)
            yield self

    def watch(self, name: str, parameter: Tensor) -> None:
        """Follow a sharded parameter that has become whole."""
        self._sharded.watch(name, parameter)

    def taken(self) -> dict[str, Tensor]:
        """Return the gradients that were taken, by name; call it while `open` is."""
        return {
            **{name: p.grad.detach() for name, p in self._whole.items() if p.grad is not None},
            **self._sharded.sums,
        }

    def unseen(self) -> list[str]:
        """Return the sharded parameters that got a gradient outside their unit's forward."""
        return self._sharded.unseen()

    def touched(self) -> list[str]:
        """Return the parameters that got a gradient in an ordinary backward."""
        whole = [name for name, parameter in self._whole.items() if self._before[name].touched(parameter)]
        return [*whole, *self._sharded.touched, *self._sharded.unseen()]

    def change(self) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
        """Return the gradients before and after an ordinary backward, by name.

        None before: there was none, so the gradient after is all that the backward added.
        """
        if self._reduced:
            return {}, {**self._local, **self._sharded.sums}
        before = {name: self._before[name].copy_for(parameter) for name, parameter in self._whole.items()}
        return before, {**{name: p.grad for name, p in self._whole.items()}, **self._sharded.sums}

    def _collect(self, name: str, gradient: Tensor) -> None:
        self._local[name] = self._local[name] + gradient if name in self._local else gradient.detach().clone()


class _Before:
    """The gradient of a parameter before a backward."""

    def __init__(self, parameter: Tensor, copy: bool) -> None:
        self._gradient = parameter.grad
        self._version = -1 if parameter.grad is None else parameter.grad._version
        self._copy = parameter.grad.detach().clone() if copy and parameter.grad is not None else None

    def touched(self, parameter: Tensor) -> bool:
        """Whether a backward added to the gradient."""
        gradient = parameter.grad
        return gradient is not self._gradient or (gradient is not None and gradient._version != self._version)

    def copy_for(self, parameter: Tensor) -> Tensor | None:
        """Return the copy; None if there was no gradient, or if somebody replaced it since."""
        return self._copy if parameter.grad is self._gradient else None


@contextmanager
def gradients_set_aside(model: nn.Module) -> Iterator[None]:
    """Give every whole parameter an empty ``.grad`` inside, and its old one (None included) back afterwards."""
    earlier = [(parameter, parameter.grad) for parameter in model.parameters() if not is_sharded(parameter)]
    try:
        for parameter, _ in earlier:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in earlier:
            parameter.grad = gradient


@contextmanager
def without_synchronisation(model: nn.Module) -> Iterator[None]:
    """Disable DistributedDataParallel's synchronisation inside: ranks may run different numbers of passes."""
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


def _synchronises(model: nn.Module) -> bool:
    """Whether the next backward leaves the mean over several ranks in ``p.grad``."""
    wrapper = _data_parallel(model)
    return wrapper is not None and bool(wrapper.require_backward_grad_sync) and wrapper.process_group.size() > 1


def _data_parallel(model: nn.Module) -> DistributedDataParallel | None:
    wrapper = uncompiled(model)
    return wrapper if isinstance(wrapper, DistributedDataParallel) else None
