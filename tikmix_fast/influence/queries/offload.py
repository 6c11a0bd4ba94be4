"""Task gradients and queries that rest in host memory and visit the device one weight at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "Copier", "CudaCopier", "Prefetcher", "can_leave", "copier_for", "free_memory"]

# Of a tensor in shared memory, in bytes: what torch's own allocator gives, and more than any kernel asks for.
ALIGNMENT = 512


class Copier(Protocol):
    """What moves tensors between the host and one device; the host itself need not wait for any of it.

    Everything is ordered after what was enqueued on the device before the call. `start` runs beside what is enqueued
    later, until `wait` puts a stop to that.
    """

    def to_host(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """Copy a tensor to the host (into the tensor given, if any) and return the copy, for this copier to read."""

    def fetch(self, host: Tensor) -> Tensor:
        """Return a copy on the device of a tensor that `to_host` made."""

    def allocate(self, size: int) -> Tensor:
        """Return ``size`` bytes on the device, uint8, that `start` may fill."""

    def start(self, host: Tensor, into: Tensor) -> Any:
        """Begin to copy ``host`` into a tensor on the device and return a mark for `wait`."""

    def wait(self, mark: Any) -> None:
        """Let whatever is enqueued on the device from now on come after the copy that the mark stands for."""


class CudaCopier:
    """Pinned host memory and a stream of its own for what is prefetched."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def to_host(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """Copy on the current stream."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True) if into is None else into
        return host.copy_(tensor, non_blocking=True)

    def fetch(self, host: Tensor) -> Tensor:
        """Copy on the current stream."""
        return host.to(self._device, non_blocking=True)

    def allocate(self, size: int) -> Tensor:
        """Allocate for the current stream, and keep it, when freed, until the copies into it are done."""
        memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        memory.record_stream(self._stream)
        return memory

    def start(self, host: Tensor, into: Tensor) -> Any:
        """Copy on the side stream, after what the current one was given so far: it may still read ``into``."""
        current = torch.cuda.current_stream(self._device)
        into.record_stream(current)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            into.copy_(host, non_blocking=True)
        return self._stream.record_event()

    def wait(self, mark: Any) -> None:
        """Let the current stream wait for the event."""
        torch.cuda.current_stream(self._device).wait_event(mark)


def copier_for(device: torch.device) -> Copier | None:
    """Return what moves queries of parameters on that device to the host and back; None on the CPU: they are there.

    Raises
    ------
    ValueError
        If the device is neither.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise ValueError(f"queries_device must be None for parameters on {device}: only CUDA devices can be relieved")
    return CudaCopier(device)


def can_leave(shape: torch.Size, projected: bool = False) -> bool:
    """Whether the queries of a parameter of this shape leave the device: vectors and projected ones are small."""
    return len(shape) > 1 and not projected


def free_memory(device: torch.device) -> tuple[int, int] | None:
    """Return the bytes that are free on a CUDA device beyond what the process has needed so far, and those it has.

    None on the CPU. What torch keeps for reuse counts as free above its peak: below it, activations come back to it.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    spare = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return free + max(spare, 0), total


@dataclass
class _Visitor:
    """A tensor in the memory shared by two; ``mark`` is not None while its copy may still run."""

    name: str
    start: int
    size: int
    value: Tensor
    mark: Any


class Prefetcher:
    """Bring tensors from the host in an order that the first pass teaches; two at most are on the device.

    While one is in use the next is on its way, into the other end of one piece of memory: as large as two that follow
    each other. What `get` returned is valid until the next `get`.

    Parameters
    ----------
    copier : Copier
    host : mapping of str to Tensor
        What there is to bring. It may change between calls, see `forget`.
    """

    def __init__(self, copier: Copier, host: Mapping[str, Tensor]) -> None:
        self._copier, self._host = copier, host
        self._memory: Tensor | None = None
        self._visitors: list[_Visitor] = []
        self._order: list[str] = []
        self._used: list[str] = []
        self._learning = False

    def begin(self) -> None:
        """Begin a pass: what the last one used first sets out."""
        self._used, self._learning = [], True
        if self._order and all(each.name != self._order[0] for each in self._visitors):
            self._start(self._order[0])

    def end(self) -> None:
        """End the pass: what it used, in its order, is what the next one expects."""
        self._learning = False
        if self._used:
            self._order = self._used
        if self._memory is not None and self._memory.nbytes != self._planned():
            self._visitors, self._memory = [], None

    def get(self, name: str) -> Tensor:
        """Return a tensor on the device, and send for the one that is expected after it."""
        if self._learning:
            self._used.append(name)
        visitor = next((each for each in self._visitors if each.name == name), None) or self._start(name)
        following = self._following(name) if self._learning else None
        if following is not None and all(each.name != following for each in self._visitors):
            self._start_beside(visitor, following)
        if visitor.mark is not None:
            self._copier.wait(visitor.mark)
            visitor.mark = None
        return visitor.value

    def forget(self, name: str) -> None:
        """Bring this one anew when it is asked for next: the host's changed."""
        self._visitors = [each for each in self._visitors if each.name != name]

    def _start(self, name: str) -> _Visitor:
        """Send for a tensor that is needed now: whatever else is there makes room, all its uses are enqueued."""
        size = _room(self._host[name])
        if self._memory is None or self._memory.nbytes < size:
            self._visitors, self._memory = [], None  # freed before a larger piece is asked for
            self._memory = self._copier.allocate(max(size, self._planned()))
        self._visitors = [self._send(name, self._memory, 0)]
        return self._visitors[0]

    def _start_beside(self, visitor: _Visitor, name: str) -> None:
        """Send for a tensor that is needed next, into the end of the memory that ``visitor`` leaves free."""
        size = _room(self._host[name])
        if self._memory is not None and visitor.size + size <= self._memory.nbytes:
            start = self._memory.nbytes - size if visitor.start == 0 else 0
            self._visitors = [visitor, self._send(name, self._memory, start)]

    def _send(self, name: str, memory: Tensor, start: int) -> _Visitor:
        host = self._host[name]
        value = memory[start : start + host.nbytes].view(host.dtype).view(host.shape)
        return _Visitor(name, start, _room(host), value, self._copier.start(host, value))

    def _planned(self) -> int:
        """Return the bytes of the largest two that follow each other."""
        pairs = ((one, other) for one, other in pairwise([*self._order[:1], *self._order]) if one != other)
        single = max((_room(self._host[name]) for name in self._order), default=0)
        return max((_room(self._host[one]) + _room(self._host[other]) for one, other in pairs), default=single)

    def _following(self, name: str) -> str | None:
        """Return what the last pass used after this, the first that is not the same."""
        place = len(self._used) - 1
        if not (place < len(self._order) and self._order[place] == name):
            if name not in self._order:
                return None
            place = self._order.index(name)
        return next((each for each in self._order[place:] if each != name), None)


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
