"""Between host and device without waiting: small tensors sent, results read back together at the end."""

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
        # Only from pinned memory does a copy run by itself.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def read_together(groups: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
    """Bring tensors to the host as float64, with one copy (and one wait) per device for all of them.

    Examples
    --------
    >>> read_together({"flags": [torch.tensor(True)], "counts": [torch.tensor([2, 3])]})
    {'flags': [tensor(1., dtype=torch.float64)], 'counts': [tensor([2., 3.], dtype=torch.float64)]}
    """
    flat = [each.detach() for tensors in groups.values() for each in tensors]
    found: dict[int, Tensor] = {}
    for device in {each.device for each in flat}:
        here = [index for index, each in enumerate(flat) if each.device == device]
        numbers = torch.cat([flat[index].reshape(-1).double() for index in here]).cpu()
        parts = numbers.split([flat[index].numel() for index in here])
        found |= {index: part.view(flat[index].shape) for index, part in zip(here, parts, strict=True)}
    remaining = iter(range(len(flat)))
    return {name: [found[next(remaining)] for _ in tensors] for name, tensors in groups.items()}


class PassStreams:
    """The CUDA streams that a forward ran on, so that what its backward left there is read only when it is done."""

    def __init__(self) -> None:
        self._streams: set[torch.cuda.Stream] = set()

    def note(self, tensor: Tensor) -> None:
        """Note the stream on which ``tensor``'s device works now; the backward will run on it too."""
        if tensor.device.type == "cuda":
            self._streams.add(torch.cuda.current_stream(tensor.device))

    def join(self, kept: Iterable[Tensor] = ()) -> None:
        """Let the current stream of each device wait for the streams noted; the host does not wait.

        The memory of ``kept`` was asked for on those and will be read on the current one, also when it is let go.
        """
        others = [each for each in self._streams if each != torch.cuda.current_stream(each.device)]
        for stream in others:
            torch.cuda.current_stream(stream.device).wait_stream(stream)
        for tensor in kept if others else ():
            if tensor.device.type == "cuda" and not tensor.is_sparse:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
