"""Transfers between host and device: send without waiting, read back many tensors with one wait."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["PassStreams", "read_together", "send"]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a CPU tensor on the device; the host does not wait for the copy.

    Examples
    --------
    >>> send(torch.tensor([1, 2]), torch.device("cpu"))
    tensor([1, 2])
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        # Only copies from pinned memory run asynchronously.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def read_together(groups: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
    """Copy tensors to the host as float64, with one copy and one wait per device.

    Examples
    --------
    >>> read_together({"flags": [torch.tensor(True)], "counts": [torch.tensor([2, 3])]})
    {'flags': [tensor(1., dtype=torch.float64)], 'counts': [tensor([2., 3.], dtype=torch.float64)]}
    """
    flat = [each.detach() for tensors in groups.values() for each in tensors]
    results: dict[int, Tensor] = {}
    for device in {each.device for each in flat}:
        here = [index for index, each in enumerate(flat) if each.device == device]
        numbers = torch.cat([flat[index].reshape(-1).double() for index in here]).cpu()
        parts = numbers.split([flat[index].numel() for index in here])
        results |= {index: part.view(flat[index].shape) for index, part in zip(here, parts, strict=True)}
    remaining = iter(range(len(flat)))
    return {name: [results[next(remaining)] for _ in tensors] for name, tensors in groups.items()}


class PassStreams:
    """The CUDA streams of a forward; its backward runs on them too, and must end before its results are read."""

    def __init__(self) -> None:
        self._streams: set[torch.cuda.Stream] = set()

    def note(self, tensor: Tensor) -> None:
        """Add the current stream of the tensor's device."""
        if tensor.device.type == "cuda":
            self._streams.add(torch.cuda.current_stream(tensor.device))

    def join(self, results: Iterable[Tensor] = ()) -> None:
        """Make the current stream of each device wait for the noted streams; the host does not wait.

        ``results`` were allocated on the noted streams. Their memory is not reused before the current stream has read
        them.
        """
        others = [each for each in self._streams if each != torch.cuda.current_stream(each.device)]
        for stream in others:
            torch.cuda.current_stream(stream.device).wait_stream(stream)
        for tensor in results if others else ():
            if tensor.device.type == "cuda" and not tensor.is_sparse:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
