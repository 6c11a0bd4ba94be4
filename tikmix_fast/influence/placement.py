"""Whether task gradients and queries rest on their device or in host memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch

from tikmix_fast.influence.memory_estimate import MemoryEstimate, readable_size
from tikmix_fast.influence.queries import offload
from tikmix_fast.influence.queries.offload import Copier

__all__ = ["choose_copiers"]

_LOG = logging.getLogger("tikmix_fast")


def choose_copiers(
    devices: Iterable[torch.device],
    queries_device: str | None,
    estimate: Callable[[torch.dtype | None, torch.device], MemoryEstimate],
) -> dict[torch.device, Copier]:
    """Return a copier for every device whose queries rest in host memory.

    Parameters
    ----------
    devices : iterable of torch.device
    queries_device : None, "cpu" or "auto"
        As in `InfluenceEngine`.
    estimate : callable (dtype of the rows, device) -> MemoryEstimate
        What the engine takes if its queries stay on the device.
    """
    copiers: dict[torch.device, Copier] = {}
    for device in devices:
        if queries_device is None or (queries_device == "auto" and _fits(device, estimate)):
            continue
        copier = offload.copier_for(device)
        if copier is not None:
            copiers[device] = copier
    return copiers


def _fits(device: torch.device, estimate: Callable[[torch.dtype | None, torch.device], MemoryEstimate]) -> bool:
    memory = offload.free_memory(device)
    if memory is None:
        return True
    free, total = memory
    cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    peak = estimate(cast, device).peak
    # The activations of a first step are not known yet, and memory becomes fragmented.
    fits = peak <= free - total // 20
    _LOG.info(
        "queries rest %s: they take %s at the peak on %s, of whose %s %s are free",
        "there" if fits else "in host memory",
        *(readable_size(peak), device, readable_size(total), readable_size(free)),
    )
    return fits
