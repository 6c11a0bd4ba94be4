"""Tell whether the weights of a model changed, whoever changed them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tikmix_fast.influence.parallel.fully_sharded import local

__all__ = ["Weights"]


class Weights:
    """What the weights are now, for comparison later: where they lie, torch's version counters, and their norms.

    Version counters alone do not do: fused optimizers and writes through ``.data`` leave them as they are. Costs one
    read of the weights, of this rank's parts where they are sharded. The host waits for nothing.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        parameters = {name: local(parameter) for name, parameter in parameters.items()}
        self._places = {name: (parameter._version, parameter.data_ptr()) for name, parameter in parameters.items()}
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for parameter in parameters.values():
            groups.setdefault((parameter.device, parameter.dtype), []).append(parameter.detach())
        # A norm in half precision would not see a small change.
        self._norms = {
            key: torch.stack(torch._foreach_norm(some, 2, dtype=torch.promote_types(key[1], torch.float32)))
            for key, some in groups.items()
        }

    @property
    def on_host(self) -> bool:
        """Whether all weights lie on the CPU, so that reading `differences` costs no waiting."""
        return all(device.type == "cpu" for device, _ in self._norms)

    def moved(self, other: Weights) -> bool:
        """Whether places or version counters differ, which the host knows by itself."""
        return self._places != other._places

    def differences(self, other: Weights) -> list[Tensor]:
        """Return flags, on the devices and not yet read: whether a norm differs. Only for weights that did not move."""
        return [
            ((norms != other._norms[key]) & ~(norms.isnan() & other._norms[key].isnan())).any()
            for key, norms in self._norms.items()
        ]
