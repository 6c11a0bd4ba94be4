"""Copy everything that training changes, and restore it bit by bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Snapshot"]

Back = Callable[[], Any]


class Snapshot:
    """The state of models, optimizers, samplers and random generators at one moment.

    Parameters
    ----------
    owners : iterable
        Objects that training changes. Each is one of

        - a module: parameters, buffers (persistent or not), gradients, training mode, ``requires_grad``, extra state;
        - an optimizer: state and parameter groups; list the module of its parameters too;
        - a tensor, or a dict or list of tensors, such as an average of the weights;
        - a `torch.Generator` or a `numpy.random.Generator`;
        - anything with ``state_dict`` and ``load_state_dict``: a scheduler, a GradScaler, a `MixtureSampler`.

        A snapshot always includes the global random states of Python, numpy, torch and its CUDA devices.

    Raises
    ------
    TypeError
        If an owner is none of these.

    Notes
    -----
    Memory: a copy of everything, on the same devices; for a model under Adam with gradients four times its parameters.
    `restore` writes tensors in place, so references to them stay valid. A snapshot does not include other attributes of
    modules, nor other processes: workers of a running `DataLoader` keep the samples that they drew ahead.

    Examples
    --------
    >>> model = nn.Linear(2, 1)
    >>> before, snapshot = model.weight.detach().clone(), Snapshot([model])
    >>> with torch.no_grad():
    ...     _ = model.weight.add_(1)
    >>> snapshot.restore()
    >>> torch.equal(model.weight, before)
    True
    """

    def __init__(self, owners: Iterable[Any]) -> None:
        if isinstance(owners, nn.Module) or not isinstance(owners, Iterable):
            raise TypeError(f"owners must be an iterable, [model, optimizer, ...]; got {type(owners).__name__}")
        self._backs = [*(_keep_owner(owner) for owner in owners), _keep_random()]

    def restore(self) -> None:
        """Restore everything; may be called any number of times."""
        for back in self._backs:
            back()


def _keep_owner(owner: Any) -> Back:
    if isinstance(owner, nn.Module):
        return _keep_module(owner)
    if isinstance(owner, torch.optim.Optimizer):
        return _keep_optimizer(owner)
    if isinstance(owner, (Tensor, dict, list)):
        return _keep(owner, {})
    if isinstance(owner, torch.Generator):
        state = owner.get_state()
        return lambda: owner.set_state(state)
    if isinstance(owner, np.random.Generator):
        numbers = copy.deepcopy(owner.bit_generator.state)
        return lambda: setattr(owner.bit_generator, "state", numbers)
    if hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict"):
        state_dict = copy.deepcopy(owner.state_dict())
        # A copy for each call: the owner may keep the state and change it.
        return lambda: owner.load_state_dict(copy.deepcopy(state_dict))
    raise TypeError(
        "an owner must be a module, an optimizer, a tensor, a dict or list of tensors, a random generator, or have"
        f" state_dict and load_state_dict; got {type(owner).__name__}"
    )


def _keep_module(module: nn.Module) -> Back:
    memo: dict[int, Back] = {}
    modules, parameters = list(module.modules()), list(module.parameters())
    # load_state_dict would skip buffers that are not persistent, and would copy into replaced tensors.
    tables = [_keep(table, memo) for each in modules for table in (each._parameters, each._buffers)]
    gradients = [(each, each.requires_grad, _keep(each.grad, memo)) for each in parameters]
    modes = [(each, each.training) for each in modules]
    has_extra = (each for each in modules if type(each).get_extra_state is not nn.Module.get_extra_state)
    extras = [(each, copy.deepcopy(each.get_extra_state())) for each in has_extra]

    def back() -> None:
        for table in tables:
            table()
        for parameter, requires, gradient in gradients:
            parameter.requires_grad_(requires)
            parameter.grad = gradient()
        for each, training in modes:
            each.training = training
        for each, extra in extras:
            each.set_extra_state(copy.deepcopy(extra))

    return back


def _keep_optimizer(optimizer: torch.optim.Optimizer) -> Back:
    # load_state_dict would cast moments to the dtype of their parameter.
    memo = {id(each): _always(each) for group in optimizer.param_groups for each in group["params"]}
    backs = _keep(optimizer.state, memo), _keep(optimizer.param_groups, memo)

    def back() -> None:
        for each in backs:
            each()

    return back


def _always(value: Any) -> Back:
    return lambda: value


def _keep(value: Any, memo: dict[int, Back]) -> Back:
    """Return a function that restores a value: tensors, dicts and lists in place, other values as a copy."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        back = _keep_tensor(value)
    elif isinstance(value, dict):
        back = _keep_dict(value, memo)
    elif isinstance(value, (list, tuple)):
        back = _keep_sequence(value, memo)
    else:
        original = copy.deepcopy(value)
        return lambda: copy.deepcopy(original)
    memo[id(value)] = back
    return back


def _keep_tensor(tensor: Tensor) -> Back:
    values = tensor.detach().clone()

    def back() -> Tensor:
        with torch.no_grad():
            return tensor.copy_(values)

    return back


def _keep_dict(table: dict[Any, Any], memo: dict[int, Back]) -> Back:
    parts = {key: _keep(value, memo) for key, value in table.items()}

    def back() -> dict[Any, Any]:
        restored = {key: part() for key, part in parts.items()}
        table.clear()
        table.update(restored)
        return table

    return back


def _keep_sequence(values: list[Any] | tuple[Any, ...], memo: dict[int, Back]) -> Back:
    parts = [_keep(value, memo) for value in values]

    def back() -> list[Any] | tuple[Any, ...]:
        restored = [part() for part in parts]
        if isinstance(values, tuple):
            return type(values)(restored) if type(values) is tuple else type(values)(*restored)
        values[:] = restored
        return values

    return back


def _keep_random() -> Back:
    python, numbers, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def back() -> None:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002  users' code may draw from the global state
        torch.set_rng_state(torch_state)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)

    return back
