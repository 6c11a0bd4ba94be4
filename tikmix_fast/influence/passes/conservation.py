"""Conservation: the influence of all rows together must equal that of the gradient that the optimizer will see."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tikmix_fast import ops

__all__ = ["ConservationError", "check_conservation"]


class ConservationError(RuntimeError):
    """The captured influence of a parameter disagrees with its gradient."""


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
        The captured influence, in the units of the gradient that flowed.
    queries : [q, *shape] by name
    before, after : by name
        The gradient before and after the pass, or None.
    tolerance : float
        The largest allowed difference, as a share of the parameter's |query| |gradient|. A thousandth of that share of
        all parameters' |query| |gradient| is allowed on top, because some gradients (a key's bias) are zero but for
        rounding.
    projections : by name, optional
        The parameters whose projected gradient is compared.

    Raises
    ------
    ConservationError
        If a use of a parameter was not captured, or a hook changed its gradient; names the largest deviation.
    """
    deviations: list[tuple[str, Tensor, Tensor, float, float]] = []
    for name, captured in sums.items():
        gradient, earlier = after.get(name), before.get(name)
        if gradient is None or (earlier is not None and not bool(torch.isfinite(_dense(earlier)).all())):
            continue
        added = now = _dense(gradient)
        if earlier is not None:
            added = now - _dense(earlier)
        # Adding to an earlier gradient rounds to that gradient's size and dtype.
        rounding = 0.0 if earlier is None else 8 * torch.finfo(gradient.dtype).eps * float(now.norm())
        if projections and name in projections:
            added = projections[name].project(added)
        flat = added.reshape(-1)
        influence = torch.stack([torch.dot(query.reshape(-1).double(), flat) for query in queries[name]])
        lengths = torch.stack([query.norm() for query in queries[name]]).double()
        deviations.append((name, (influence - captured.sum(1)).abs(), lengths, float(added.norm()), rounding))
    if not deviations:
        return
    whole = torch.stack([lengths.square() for _, _, lengths, _, _ in deviations]).sum(0).sqrt()
    whole_change = math.sqrt(sum(change**2 for _, _, _, change, _ in deviations))
    worst, worst_name = 0.0, ""
    for name, difference, lengths, change, rounding in deviations:
        allowed = lengths * (tolerance * change + rounding) + 1e-3 * tolerance * whole * whole_change
        # `not all(<=)` instead of `any(>)`: a NaN on either side counts as a deviation.
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
