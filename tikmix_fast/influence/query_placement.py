"""Whether task gradients and queries rest on their device or in host memory."""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch
from torch import nn

from tikmix_fast.influence.memory_estimate import MemoryEstimate, estimate_memory, readable_size
from tikmix_fast.influence.options import EngineOptions
from tikmix_fast.influence.passes.covered_parameters import CoveredParameters
from tikmix_fast.influence.queries import offload
from tikmix_fast.influence.queries.offload import Copier

__all__ = ["Placement"]

_LOG = logging.getLogger("tikmix_fast")


class Placement:
    """Decide once where sums and queries rest, and estimate the memory of either choice.

    Parameters
    ----------
    model : nn.Module
    options : EngineOptions
    covered : CoveredParameters
    adam : bool
        Whether the preconditioner is Adam's.
    shares : int
        The number of ranks that each hold a share of sums and queries.

    Attributes
    ----------
    copiers : dict of torch.device to Copier, or None
        A copier for every device whose sums and queries rest in host memory; None before `decide`.
    """

    def __init__(
        self, model: nn.Module, options: EngineOptions, covered: CoveredParameters, *, adam: bool, shares: int
    ) -> None:
        self._model, self._options, self._covered = model, options, covered
        self._adam, self._shares = adam, shares
        self.copiers: dict[torch.device, Copier] | None = None

    def decide(self, devices: Collection[torch.device]) -> bool:
        """Choose the copiers, given the devices of the parameters; return False if they were chosen before."""
        if self.copiers is not None:
            return False
        choice = self._options.queries_device
        leaving = [each for each in devices if choice == "cpu" or (choice == "auto" and not self._fits(each))]
        copiers = {device: offload.copier_for(device) for device in leaving}
        self.copiers = {device: copier for device, copier in copiers.items() if copier is not None}
        return True

    def memory_estimate(
        self, dtype: torch.dtype | None, tokens: int, device: torch.device, queries_device: str | None
    ) -> MemoryEstimate:
        """See `InfluenceEngine.memory_estimate`."""
        options = self._options
        if queries_device is None and self.copiers is not None:
            away = device in self.copiers
        else:
            away = (queries_device or options.queries_device) == "cpu" and device.type != "cpu"
        return estimate_memory(
            self._model,
            {name: p for name, p in self._covered.parameters().items() if p.device == device},
            queries=len(options.tasks) * options.task_splits,
            domains=len(options.domains),
            projection=options.projection,
            adam=self._adam,
            away=away,
            shares=self._shares,
            checked=options.check_every > 0,
            dtype=dtype,
            tokens=tokens,
        )

    def _fits(self, device: torch.device) -> bool:
        memory = offload.free_memory(device)
        if memory is None:
            return True
        free, total = memory
        cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        peak = self.memory_estimate(cast, 0, device, "auto").peak
        # Leave room for the unknown activations of a first step, and for fragmentation.
        fits = peak <= free - total // 20
        _LOG.info(
            "queries rest %s: they take %s at the peak on %s, of whose %s %s are free",
            "there" if fits else "in host memory",
            *(readable_size(peak), device, readable_size(total), readable_size(free)),
        )
        return fits
