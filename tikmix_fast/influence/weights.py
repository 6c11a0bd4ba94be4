"""Tell whether the weights of a model changed, whoever changed them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Weights"]


class Weights:
    """What the weights are now, for comparison later: where they lie, torch's version counters, and their norms.

    Version counters alone do not do: fused optimizers and writes through ``.data`` leave them as they are. Costs one
    read of the weights.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._places = {name: (parameter._version, parameter.data_ptr()) for name, parameter in parameters.items()}
        with torch.no_grad():
            norms = torch._foreach_norm([parameter.detach() for parameter in parameters.values()])
        self._norms = torch.stack([norm.double().cpu() for norm in norms])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Weights)
            and self._places == other._places
            and torch.equal(self._norms.nan_to_num(), other._norms.nan_to_num())
        )
