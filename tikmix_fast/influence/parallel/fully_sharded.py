"""Models under ``fully_shard`` (FSDP2): a rank holds a part of every parameter, and during a pass all of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ShardedGradients", "check_sharding", "is_sharded", "local", "mesh_group", "reshard", "units", "whole"]


def is_sharded(tensor: Any) -> bool:
    """Whether ranks hold parts of the tensor (a DTensor)."""
    tensors = sys.modules.get("torch.distributed.tensor")  # without it there is none
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, with its own version counter; the tensor itself if it is not sharded.

    Examples
    --------
    >>> local(torch.ones(2))
    tensor([1., 1.])
    """
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor as one process would hold it. Every rank must call this for a sharded tensor.

    Examples
    --------
    >>> whole(torch.ones(2))
    tensor([1., 1.])
    """
    if not is_sharded(tensor):
        return tensor
    gathered: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return gathered


def units(model: nn.Module) -> list[nn.Module]:
    """Return the modules that ``fully_shard`` was called on; their forward makes their parameters whole."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def reshard(model: nn.Module) -> None:
    """Make every unit hold its parameters as parts, which is how optimizers know them."""
    for unit in units(model):
        unit.reshard()  # type: ignore[operator]


def mesh_group(model: nn.Module) -> torch.distributed.ProcessGroup | None:
    """Return the ranks that a sharded model is spread over, replicas included; None for a model that is not sharded.

    Raises
    ------
    ValueError
        If they are neither one dimension of a mesh nor all processes.
    """
    mesh: Any = next((each.device_mesh for each in _sharded(model.parameters())), None)
    if mesh is None:
        return None
    if mesh.ndim == 1:
        group: torch.distributed.ProcessGroup = mesh.get_group()
        return group
    if mesh.size() == torch.distributed.get_world_size():
        return torch.distributed.group.WORLD
    raise ValueError(
        "process_group must be given where a sharded model's mesh has several dimensions and is not all of the "
        f"processes: it has {mesh.size()} of {torch.distributed.get_world_size()}"
    )


def _sharded(parameters: Iterable[Any]) -> Iterator[Any]:
    return (each for each in parameters if is_sharded(each))


def check_sharding(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters that anything but ``fully_shard`` shards.

    Raises
    ------
    TypeError
        Naming the parameter: tensor parallelism, or a DTensor outside every unit.
    """
    if not any(map(is_sharded, parameters.values())):
        return
    inside = {id(p) for unit in units(model) for p in unit.parameters()}
    for name, parameter in parameters.items():
        if not is_sharded(parameter):
            continue
        sharded = [each for each in parameter.placements if not each.is_replicate()]  # type: ignore[attr-defined]
        if id(parameter) not in inside or len(sharded) > 1:
            raise TypeError(
                f"{name!r} must be whole in its forward: a DTensor is supported where fully_shard holds it, without "
                f"tensor parallelism; its placements are {parameter.placements}"  # type: ignore[attr-defined]
            )


class ShardedGradients:
    """The gradients of sharded parameters as this rank's backward leaves them, before the ranks reduce them.

    Parameters
    ----------
    parameters : mapping of str to Tensor
        As they are between passes.
    take : bool
        Take the gradients away, so that nothing is reduced and ``p.grad`` stays as it is. Otherwise the backward goes
        on as usual.
    keep : bool
        Keep the values; otherwise only the names are noted.

    Attributes
    ----------
    sums : dict of str to Tensor
        The sums since `open`, if values are kept.
    touched : set of str
        The parameters that got a gradient.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, take: bool, keep: bool) -> None:
        self.sums: dict[str, Tensor] = {}
        self.touched: set[str] = set()
        self._parameters = {name: parameter for name, parameter in parameters.items() if is_sharded(parameter)}
        self._take, self._keep = take, keep
        self._watched: set[int] = set()
        self._shown: set[str] = set()
        self._before: dict[str, tuple[Tensor | None, int]] = {}
        self._undo: list[Callable[[], object]] = []

    @contextmanager
    def open(self) -> Iterator[ShardedGradients]:
        """Watch from here on; afterwards the parameters are as before, with their own gradients back if taken."""
        earlier = {name: parameter.grad for name, parameter in self._parameters.items()}
        try:
            if self._take:
                for parameter in self._parameters.values():
                    parameter.grad = None
            self._before = {name: _state(parameter) for name, parameter in self._parameters.items()}
            yield self
        finally:
            while self._undo:
                self._undo.pop()()
            for name, parameter in self._parameters.items() if self._take else ():
                # The end of this pass may have reduced a gradient that waited for it.
                waiting = parameter.grad if name in self._shown else None
                before = earlier[name]
                parameter.grad = before if waiting is None else waiting if before is None else before + waiting

    def unseen(self) -> list[str]:
        """Return the parameters that got a gradient without being shown whole: used outside their unit's forward."""
        return [
            name
            for name, parameter in self._parameters.items()
            if name not in self._shown and _changed(self._before[name], _state(parameter))
        ]

    def watch(self, name: str, parameter: Tensor) -> None:
        """Watch a parameter that has become whole.

        Raises
        ------
        TypeError
            If becoming whole took it to another device.
        """
        if id(parameter) in self._watched or name not in self._parameters:
            return
        if parameter.device != self._parameters[name].device:
            raise TypeError(
                f"{name!r} must rest where it is used ({parameter.device}); got {self._parameters[name].device}: "
                "CPUOffloadPolicy is not supported"
            )
        self._watched.add(id(parameter))
        self._shown.add(name)
        if not self._take:
            self._undo.append(parameter.register_hook(lambda gradient: self._note(name, gradient)).remove)
            return
        # Micro-batches without synchronisation left a gradient here; it waits until the end.
        waiting, parameter.grad = parameter.grad, None

        def take(now: Tensor) -> None:
            if now.grad is not None:
                self._note(name, now.grad)
                now.grad = None

        def give_back() -> None:
            parameter.grad = waiting

        self._undo.append(give_back)
        self._undo.append(parameter.register_post_accumulate_grad_hook(take).remove)

    def _note(self, name: str, gradient: Tensor) -> None:
        self.touched.add(name)
        if not self._keep:
            return
        gradient = gradient.detach()
        if name in self.sums:
            self.sums[name] = self.sums[name] + gradient
        else:
            # A gradient that was taken is nobody else's. One that goes on may be changed on its way.
            self.sums[name] = gradient if self._take else gradient.clone()


def _state(parameter: Tensor) -> tuple[Tensor | None, int]:
    gradient = parameter.grad
    return gradient, -1 if gradient is None else local(gradient)._version


def _changed(before: tuple[Tensor | None, int], after: tuple[Tensor | None, int]) -> bool:
    return before[0] is not after[0] or before[1] != after[1]
