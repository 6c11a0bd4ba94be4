"""Models under ``fully_shard`` (FSDP2): a rank has a part of every parameter, and the whole one during a pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ShardedGradients", "check_sharding", "is_sharded", "local", "mesh_group", "reshard", "units", "whole"]


def is_sharded(tensor: Any) -> bool:
    """Whether the tensor is a DTensor, of which each rank has a part."""
    tensors = sys.modules.get("torch.distributed.tensor")  # not imported: there is no DTensor
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
    """Return the whole tensor. Every rank must call this for a sharded one.

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
    """Return the modules that ``fully_shard`` wraps; their forward makes their parameters whole."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def reshard(model: nn.Module) -> None:
    """Turn every unit's parameters back into parts, as optimizers know them."""
    for unit in units(model):
        unit.reshard()  # type: ignore[operator]


def mesh_group(model: nn.Module) -> torch.distributed.ProcessGroup | None:
    """Return the ranks of a sharded model, replicas included; None for a model that is not sharded.

    Raises
    ------
    ValueError
        If the mesh has several dimensions and does not include all processes.
    """
    parameters: Iterable[Any] = model.parameters()
    mesh = next((each.device_mesh for each in parameters if is_sharded(each)), None)
    if mesh is None:
        return None
    if mesh.ndim == 1:
        group: torch.distributed.ProcessGroup = mesh.get_group()
        return group
    if mesh.size() == torch.distributed.get_world_size():
        return torch.distributed.group.WORLD
    raise ValueError(
        "process_group must be given if a sharded model's mesh has several dimensions and not all processes; it has "
        f"{mesh.size()} of {torch.distributed.get_world_size()}"
    )


def check_sharding(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are sharded by anything but ``fully_shard``.

    Raises
    ------
    TypeError
        If a parameter is under tensor parallelism, or a DTensor outside every unit.
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
                f"{name!r} must be whole in its forward: a DTensor is supported only under fully_shard, without tensor "
                f"parallelism; its placements are {parameter.placements}"  # type: ignore[attr-defined]
            )


class ShardedGradients:
    """The gradients of sharded parameters from this rank's backward, before the ranks reduce them.

    Parameters
    ----------
    parameters : mapping of str to Tensor
        The parameters between passes.
    take : bool
        Take the gradients away: the ranks reduce nothing, and ``p.grad`` stays unchanged. Otherwise the backward is the
        usual one.
    keep : bool
        Keep the gradients; otherwise only the names of parameters that got one.

    Attributes
    ----------
    sums : dict of str to Tensor
        The sums of gradients since `open`, with ``keep``.
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
        """Watch the gradients inside; with ``take``, put the parameters' own gradients back afterwards."""
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
                # A gradient that waited for reduction (see `watch`) may have been reduced at the end of this pass.
                waiting = parameter.grad if name in self._shown else None
                before = earlier[name]
                parameter.grad = before if waiting is None else waiting if before is None else before + waiting

    def unseen(self) -> list[str]:
        """Return the parameters that got a gradient outside their unit's forward, where they are not whole."""
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
            If the whole parameter is on another device than its part.
        """
        if id(parameter) in self._watched or name not in self._parameters:
            return
        if parameter.device != self._parameters[name].device:
            raise TypeError(
                f"{name!r} must rest on the device that uses it ({parameter.device}); got "
                f"{self._parameters[name].device}: CPUOffloadPolicy is not supported"
            )
        self._watched.add(id(parameter))
        self._shown.add(name)
        if not self._take:
            self._undo.append(parameter.register_hook(lambda gradient: self._note(name, gradient)).remove)
            return
        # A micro-batch without synchronisation may have left a gradient here, which waits for reduction.
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
            # Nobody else uses a gradient that was taken away; others may still be changed in place.
            self.sums[name] = gradient if self._take else gradient.clone()


def _state(parameter: Tensor) -> tuple[Tensor | None, int]:
    gradient = parameter.grad
    return gradient, -1 if gradient is None else local(gradient)._version


def _changed(before: tuple[Tensor | None, int], after: tuple[Tensor | None, int]) -> bool:
    return before[0] is not after[0] or before[1] != after[1]
