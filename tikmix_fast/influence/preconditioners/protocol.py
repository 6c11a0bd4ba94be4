"""The protocol of preconditioners, and the simplest one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Identity", "Preconditioner"]


@runtime_checkable
class Preconditioner(Protocol):
    """Turn task gradients into queries; your own class needs a name and these two methods.

    When the queries freeze, once per refresh, the engine calls ``prepare``, and then ``apply`` once per parameter with
    the stacked task gradients [q, *shape]. ``apply`` may change them in place, and returns the queries in the same
    shape. S is <P g_i, g_j> for any P. It describes an optimizer step if P is symmetric and positive.

    Examples
    --------
    Steps in proportion to the size of each parameter, as in LARS:

    >>> import torch
    >>> from torch import nn
    >>> from tikmix_fast import InfluenceEngine
    >>> class RelativeSteps:
    ...     name = "relative"
    ...
    ...     def prepare(self, parameters, optimizer):
    ...         self.scale = {name: float(p.detach().square().mean()) for name, p in parameters.items()}
    ...
    ...     def apply(self, name, gradients):
    ...         return gradients.mul_(self.scale[name])
    >>> model = nn.Linear(4, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 3.0)
    >>> engine = InfluenceEngine(model, ["web"], ["qa"], preconditioner=RelativeSteps())
    >>> with engine.task("qa"):
    ...     model(torch.ones(8, 4)).mean().backward()
    >>> with engine.domains("web"):
    ...     model(torch.ones(8, 4)).mean().backward()
    >>> engine.matrix().values  # 9 times <g, g> = 4
    array([[36.]])
    """

    name: str

    def prepare(self, parameters: Mapping[str, Tensor], optimizer: Any) -> None:
        """Read whatever ``apply`` needs at the current weights."""

    def apply(self, name: str, gradients: Tensor) -> Tensor:
        """Return P applied to the gradients [q, *shape] of one parameter."""


class Identity:
    """P = I: influence is the plain inner product of gradients (as in DoGE and DGA).

    Examples
    --------
    >>> import torch
    >>> Identity().apply("weight", torch.ones(1, 2))
    tensor([[1., 1.]])
    """

    name = "identity"

    def prepare(self, parameters: Mapping[str, Tensor], optimizer: Any) -> None:
        """Do nothing."""

    def apply(self, name: str, gradients: Tensor) -> Tensor:
        """Return the gradients unchanged."""
        return gradients
