"""Task gradients and queries can rest in host memory; they visit the device one weight at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Copier", "CudaCopier", "Prefetcher", "aligned", "can_leave", "copier_for", "free_memory", "room_for_two"]

# Bytes. torch's own allocator aligns to as many, and no kernel asks for more.
_ALIGNMENT = 512


class Copier(Protocol):
    """Move tensors between the host and one device; the host need not wait for any copy.

    Each copy comes after the work that was enqueued on the device before the call. A copy by `start` runs beside later
    work, until `wait`.
    """

    def to_host(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """Copy a tensor to the host, into ``into`` if given, and return the copy for `fetch` and `start`."""

    def fetch(self, host: Tensor) -> Tensor:
        """Return a copy on the device of a tensor that `to_host` made."""

    def allocate(self, size: int) -> Tensor:
        """Return ``size`` bytes on the device, uint8, for `start` to fill."""

    def start(self, host: Tensor, into: Tensor) -> Any:
        """Start copying ``host`` into a tensor on the device, and return a mark for `wait`."""

    def wait(self, mark: Any) -> None:
        """Make the work that is enqueued on the device from now on wait for the marked copy."""


class CudaCopier:
    """Copy by way of pinned host memory; prefetched copies run on a side stream."""

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
        """Allocate for the current stream; once freed, the memory is reused only after the copies into it end."""
        memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        memory.record_stream(self._stream)
        return memory

    def start(self, host: Tensor, into: Tensor) -> Any:
        """Copy on the side stream, after the current stream's work so far, which may still read ``into``."""
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
    """Return a copier for the queries of parameters on that device; None on the CPU, where the host's memory is.

    Raises
    ------
    ValueError
        If the device is neither a CPU nor a CUDA device.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise ValueError(f"queries_device must be None for parameters on {device}: queries can leave CUDA devices only")
    return CudaCopier(device)


def can_leave(shape: torch.Size, projected: bool = False) -> bool:
    """Whether the queries of such a parameter leave the device; small ones (vectors, projected) stay."""
    return len(shape) > 1 and not projected


def free_memory(device: torch.device) -> tuple[int, int] | None:
    """Return a CUDA device's free bytes and its total bytes; None for a CPU.

    Memory that torch keeps for reuse counts as free above the process's peak so far. Below the peak, activations will
    need it again.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    spare = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return free + max(spare, 0), total


@dataclass
class _Visitor:
    """A tensor on the device, in the memory for two. ``mark`` is None once its copy has been waited for."""

    name: str
    start: int
    size: int
    value: Tensor
    mark: Any


class Prefetcher:
    """Bring tensors from the host in the order of the previous pass; at most two are on the device.

    While one tensor is in use, the next one is copied into the other end of one piece of memory, which is as large as
    the largest two in succession. A tensor from `get` is valid until the next `get`.

    Parameters
    ----------
    copier : Copier
    host : mapping of str to Tensor
        The tensors at rest. Call `forget` for one that changes.
    """

    def __init__(self, copier: Copier, host: Mapping[str, Tensor]) -> None:
        self._copier, self._host = copier, host
        self._memory: Tensor | None = None
        self._visitors: list[_Visitor] = []
        self._order: list[str] = []
        self._used: list[str] = []
        self._learning = False

    def begin(self) -> None:
        """Begin a pass: start copying the tensor that the previous pass used first."""
        self._used, self._learning = [], True
        if self._order and all(each.name != self._order[0] for each in self._visitors):
            self._start(self._order[0])

    def end(self) -> None:
        """End the pass, and expect its order in the next one."""
        self._learning = False
        if self._used:
            self._order = self._used
        if self._memory is not None and self._memory.nbytes != self._planned():
            self._visitors, self._memory = [], None

    def get(self, name: str) -> Tensor:
        """Return a tensor on the device, and start copying the one that is expected next."""
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
        """Copy this tensor again at its next `get`, because the host's one changed."""
        self._visitors = [each for each in self._visitors if each.name != name]

    def _start(self, name: str) -> _Visitor:
        """Fetch a tensor needed now. Residents may be evicted: kernels reading them are already enqueued."""
        size = aligned(self._host[name].nbytes)
        if self._memory is None or self._memory.nbytes < size:
            self._visitors, self._memory = [], None  # freed before a larger piece is asked for
            self._memory = self._copier.allocate(max(size, self._planned()))
        self._visitors = [self._send(name, self._memory, 0)]
        return self._visitors[0]

    def _start_beside(self, visitor: _Visitor, name: str) -> None:
        """Fetch the tensor needed next, into the end of the memory that ``visitor`` leaves free."""
        size = aligned(self._host[name].nbytes)
        if self._memory is not None and visitor.size + size <= self._memory.nbytes:
            start = self._memory.nbytes - size if visitor.start == 0 else 0
            self._visitors = [visitor, self._send(name, self._memory, start)]

    def _send(self, name: str, memory: Tensor, start: int) -> _Visitor:
        host = self._host[name]
        value = memory[start : start + host.nbytes].view(host.dtype).view(host.shape)
        return _Visitor(name, start, aligned(host.nbytes), value, self._copier.start(host, value))

    def _planned(self) -> int:
        """Return the memory for the expected order, bytes."""
        return room_for_two([(name, self._host[name].nbytes) for name in self._order])

    def _following(self, name: str) -> str | None:
        """Return the first other tensor that the previous pass used after this one."""
        place = len(self._used) - 1
        if not (place < len(self._order) and self._order[place] == name):
            if name not in self._order:
                return None
            place = self._order.index(name)
        return next((each for each in self._order[place:] if each != name), None)


def aligned(size: int) -> int:
    """Return the bytes that a tensor of ``size`` bytes takes in memory for two."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def room_for_two(order: Sequence[tuple[str, int]]) -> int:
    """Return the bytes of the largest two tensors in succession, given names and bytes in the order of use.

    Examples
    --------
    >>> room_for_two([("a", 1), ("a", 1), ("b", 513)])
    1536
    """
    sizes = {name: aligned(size) for name, size in order}
    pairs = (sizes[one] + sizes[other] for (one, _), (other, _) in pairwise(order) if one != other)
    return max(pairs, default=max(sizes.values(), default=0))
