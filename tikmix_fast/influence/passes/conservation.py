"""Covered means conserved: the influence of all rows together is that of the gradient the optimizer will see."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tikmix_fast import ops

__all__ = ["ConservationError", "check_conservation"]


class ConservationError(RuntimeError):
    """What was captured of a parameter is not what its gradient holds."""


def check_conservation(
    sums: Mapping[str, Tensor],
    queries: Mapping[str, Tensor],
    before: Mapping[str, Tensor | None],
    after: Mapping[str, Tensor | None],
    tolerance: float,
    projections: Mapping[str, ops.LayerProjection] | None = None,
) -> None:
    """Compare, for every parameter and query, the sum over domains with <query, p.grad after - before>.

    Parameters
    ----------
    sums : float64 [q, m] by name
        Captured, in the units of the gradient that flowed.
    queries : [q, *shape] by name
    before, after : gradient before and after the pass, or None, by name
    projections : by name, optional
        Of these parameters the projected gradient is compared.
    tolerance : float
        Largest difference allowed, as a share of |query| |gradient| of the parameter. A thousandth of it, as a share of
        those of all parameters together, is allowed besides: some gradients, such as that of a key's bias, are zero but
        for rounding.

    Raises
    ------
    ConservationError
        Naming the parameter that deviates most: one of its uses was not captured, or a hook changed its gradient.
    """
    deviations: list[tuple[str, Tensor, Tensor, float, float]] = []
    for name, captured in sums.items():
        gradient, earlier = after.get(name), before.get(name)
        if gradient is None or (earlier is not None and not bool(torch.isfinite(_dense(earlier)).all())):
            continue
        added = now = _dense(gradient)
        if earlier is not None:
            added = now - _dense(earlier)
        # Adding to a gradient that was there rounds by its size and dtype.
        rounding = 0.0 if earlier is None else 8 * torch.finfo(gradient.dtype).eps * float(now.norm())
        if projections and name in projections:
            added = projections[name].project(added)
        flat = added.reshape(-1)
        found = torch.stack([torch.dot(query.reshape(-1).double(), flat) for query in queries[name]])
        lengths = torch.stack([query.norm() for query in queries[name]]).double()
        deviations.append((name, (found - captured.sum(1)).abs(), lengths, float(added.norm()), rounding))
    if not deviations:
        return
    whole = torch.stack([lengths.square() for _, _, lengths, _, _ in deviations]).sum(0).sqrt()
    whole_change = math.sqrt(sum(change**2 for _, _, _, change, _ in deviations))
    worst, worst_name = 0.0, ""
    for name, difference, lengths, change, rounding in deviations:
        allowed = lengths * (tolerance * change + rounding) + 1e-3 * tolerance * whole * whole_change
        # Written so that a NaN on either side counts as a deviation.
        if not bool((difference <= allowed).all()):
            share = float((difference / (lengths * change).clamp_min(1e-300)).max())
            if not share <= worst or not worst_name:
                worst, worst_name = share, name
    if worst_name:
        raise ConservationError(
            f"the captured influence of {worst_name!r} differs from its gradient by {worst:.2g} of |query| "
            f"|gradient| (allowed: {tolerance:.0e}): one of its uses was not captured (a tied weight used through a "
            "reference kept outside its module, say), a hook changes its gradient, or zero_grad ran inside the "
            "context. Use the parameter through its module, remove the hook while measuring, or leave it out with "
            f"exclude=[{worst_name!r}]"
        )


def _dense(gradient: Tensor) -> Tensor:
    dense: Tensor = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
    return dense.double()
