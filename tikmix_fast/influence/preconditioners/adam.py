"""P from the optimizer's second moments."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tikmix_fast.influence.parallel.fully_sharded import is_sharded, whole
from tikmix_fast.influence.preconditioners.optimizer_state import AdamMoment, read_adam

__all__ = ["Adam"]

_LOG = logging.getLogger("tikmix_fast")


class Adam:
    """P = lr / lr_ref / (sqrt(v / (1 - beta2^t)) + eps), elementwise, as the run's own optimizer scales a step.

    v and t are read from the optimizer when the queries freeze. lr is the parameter group's, lr_ref the largest lr.
    P has no momentum, weight decay or clipping; with amsgrad v is the running maximum. The optimizer does not change.

    S is then the decrease of a task's loss per unit step along P times the domain's mean gradient, with v frozen. A
    real Adam step on that domain also updates v, so its decrease is smaller by a common factor.

    Supported are torch.optim.Adam and AdamW (also fused, foreach, amsgrad), and their saved states with names. Muon,
    Shampoo, SOAP and Lion are not: Muon's step U V^T and Lion's sign are not linear maps of a gradient, so there is no
    P to build S from. Their states raise an error. If Muon trains the matrices and AdamW the rest, there are three
    ways: pass that AdamW as ``optimizer`` with ``exclude`` patterns of Muon's matrices, and measure the influence
    through the rest alone; use "ekfac" for all; or write a `Preconditioner` that calls an `Adam` or an `EKFAC`,
    depending on the name of the parameter.

    An element that was never trained (v = 0: the row of a token that has not occurred) has P = 1 / eps, some 100,000
    times the ordinary size. Adam's own first step there is of ordinary size, because it updates v too. So a few rare
    tokens dominate S while the run is young: they carried 70% of S after 1 and 3 steps of a small model, and 1% after
    10. A warning says so.

    Parameters
    ----------
    floor : float
        Lower bound of sqrt(v / (1 - beta2^t)), as a multiple of the median of the parameter's non-zero entries. 0 is
        the optimizer's own P; 1 treats elements that were never trained as ordinary ones.

    Examples
    --------
    >>> model = torch.nn.Embedding(3, 2)
    >>> optimizer = torch.optim.Adam(model.parameters(), eps=1e-8)
    >>> model(torch.tensor([0, 1])).sum().backward()
    >>> optimizer.step()
    >>> for adam in (Adam(), Adam(floor=1.0)):
    ...     adam.prepare(dict(model.named_parameters()), optimizer)
    ...     print(adam.apply("weight", torch.ones(1, 3, 2))[0, :, 0])
    tensor([1.0000e+00, 1.0000e+00, 1.0000e+08])
    tensor([1., 1., 1.])
    """

    name = "adam"

    def __init__(self, floor: float = 0.0) -> None:
        if not (isinstance(floor, (int, float)) and math.isfinite(floor) and floor >= 0):
            raise ValueError(f"floor must be a finite number of at least 0; got {floor!r}")
        self.floor = float(floor)
        if self.floor:
            self.name = f"adam, floor {self.floor:g}"  # another P, so states and matrices must differ in name
        self._moments: dict[str, AdamMoment] = {}
        self._untrained: _Share | None = None
        self.reference_lr = 0.0

    def prepare(self, parameters: Mapping[str, Tensor], optimizer: Any) -> None:
        """Read v, t and the groups' settings; raises what `optimizer_state.read_adam` raises."""
        if optimizer is None:
            raise ValueError(
                "preconditioner='adam' needs optimizer=: the torch.optim.Adam or AdamW that trains the model, or "
                "its state dict with names; or use preconditioner='identity'"
            )
        self._moments = read_adam(optimizer, parameters)
        self.reference_lr = max((moment.lr for moment in self._moments.values()), default=0.0)
        # The zeros of a sharded v are known only once it is gathered.
        second_moments = [moment.v for moment in self._moments.values()]
        some = not self.floor and any(is_sharded(v) or bool((v == 0).any()) for v in second_moments)
        self._untrained = _Share(set(self._moments)) if some else None

    def apply(self, name: str, gradients: Tensor) -> Tensor:
        """Return the gradients [q, *shape] scaled elementwise, in place."""
        moment = self._moments[name]
        denominator = moment.denominator(self.floor).to(gradients.device, gradients.dtype)
        # If all rates are zero, as before a warm-up, take them as equal: equal rates cancel.
        ratio = moment.lr / self.reference_lr if self.reference_lr > 0 else 1.0
        if self._untrained is not None:
            self._untrained.add(name, gradients, denominator, ratio, (whole(moment.v) == 0).to(gradients.device))
        return gradients.div_(denominator).mul_(ratio)


class _Share:
    """Share of task-to-task influence carried by elements the optimizer never updated; a proxy for their share of S.

    It takes one product per pair of neighbouring queries, and warns once all ``names`` were added.
    """

    def __init__(self, names: set[str]) -> None:
        self._missing = names
        self._products: list[Tensor] = []

    def add(self, name: str, gradients: Tensor, denominator: Tensor, ratio: float, untrained: Tensor) -> None:
        pairs = []
        for one, other in list(pairwise(gradients)) or [(gradients[0], gradients[0])]:
            products = torch.div(one, denominator).mul_(other)
            pairs.append(torch.stack([each.sum(dtype=torch.float64) for each in (products, products[untrained])]))
        self._products.append(torch.stack(pairs).mul_(ratio).cpu())
        self._missing.discard(name)
        if not self._missing:
            total, part = torch.stack(self._products).sum(0).abs().sum(0).tolist()
            self._products.clear()
            if part > 0.5 * total > 0:
                _LOG.warning(
                    "elements that the optimizer never trained (v = 0, P = 1 / eps) carry %.0f%% of the influence of "
                    "the tasks on each other, so they dominate S: train on, leave such tables out with exclude=, or "
                    "use preconditioner=Adam(floor=1.0)",
                    100 * min(1.0, part / total),
                )
