"""Detect whether the weights of a model changed, by whatever means."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tikmix_fast.influence.parallel.fully_sharded import local
from tikmix_fast.influence.torch_private import norms

__all__ = ["Fingerprint"]


class Fingerprint:
    """A fingerprint of the current weights: their addresses, version counters and norms.

    Version counters alone are not enough: fused optimizers and writes through ``.data`` do not change them. Costs one
    read of the weights (of this rank's parts if they are sharded), for which the host does not wait.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        parameters = {name: local(parameter) for name, parameter in parameters.items()}
        self._places = {name: (parameter._version, parameter.data_ptr()) for name, parameter in parameters.items()}
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for parameter in parameters.values():
            groups.setdefault((parameter.device, parameter.dtype), []).append(parameter.detach())
        # A norm in half precision would miss small changes.
        self._norms = {
            key: norms(tensors, torch.promote_types(key[1], torch.float32)) for key, tensors in groups.items()
        }

    def changes_since(self, earlier: Fingerprint) -> list[Tensor]:
        """Return flags, still on their devices: the weights changed if any is true.

        If an address or a version counter differs, the host knows already, and returns one true flag on the CPU.
        """
        if self._places != earlier._places:
            return [torch.tensor(True, device="cpu")]
        return [
            ((values != earlier._norms[key]) & ~(values.isnan() & earlier._norms[key].isnan())).any()
            for key, values in self._norms.items()
        ]
