"""Covered means conserved: the influence of all rows together is that of the gradient the optimizer will see."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["ConservationError", "check_conservation"]


class ConservationError(RuntimeError):
    """What was captured of a parameter is not what its gradient holds."""


def check_conservation(
    sums: Mapping[str, Tensor],
    queries: Mapping[str, Tensor],
    before: Mapping[str, Tensor | None],
    parameters: Mapping[str, Tensor],
    tolerance: float,
) -> None:
    """Compare, for every parameter and query, the sum over domains with <query, p.grad after - before>.

    Parameters
    ----------
    sums : float64 [q, m] by name
        Captured, in the units of the gradient that flowed.
    queries : [q, *shape] by name
    before : gradient before the pass, or None, by name
    parameters : by name; their ``.grad`` is the gradient after the pass
    tolerance : float
        Largest difference allowed, as a share of |query| |gradient|.

    Raises
    ------
    ConservationError
        Naming the parameter that deviates most: one of its uses was not captured, or a hook changed its gradient.
    """
    worst, worst_name = 0.0, ""
    for name, captured in sums.items():
        after = parameters[name].grad
        if after is None:
            continue
        after = _dense(after)
        earlier = before[name]
        change = after if earlier is None else after - _dense(earlier)
        # Subtracting a gradient that was there before loses what its size hides.
        rounding = 0.0 if earlier is None else 8 * torch.finfo(after.dtype).eps * float(after.norm())
        for query, total in zip(queries[name], captured.sum(1), strict=True):
            found = float(torch.dot(query.reshape(-1).double(), change.reshape(-1)))
            length = float(query.norm())
            allowed = tolerance * length * float(change.norm()) + length * rounding
            difference = abs(found - float(total))
            # Written so that a NaN on either side counts as a deviation.
            if not difference <= allowed:
                share = difference / max(length * float(change.norm()), 1e-300)
                if not share <= worst:
                    worst, worst_name = share, name
    if worst_name:
        raise ConservationError(
            f"the captured influence of {worst_name!r} differs from its gradient by {worst:.2g} of |query| "
            f"|gradient| (allowed: "
            f"{tolerance:.0e}): one of its uses was not captured (a tied weight used through a reference kept "
            f"outside its module, "
            "say), or a hook changes its gradient. Use the parameter through its module, remove the hook while "
            "measuring, or "
            f"leave it out with exclude=[{worst_name!r}]"
        )


def _dense(gradient: Tensor) -> Tensor:
    dense: Tensor = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
    return dense.double()
