"""The exact ops as torch sees them: schemas, shapes for tracing, and a refusal to differentiate."""

from __future__ import annotations

import torch
from torch import Tensor

from tikmix_fast.ops.common.checks import Arguments, check_arguments, refuse_derivatives
from tikmix_fast.ops.dispatch import empty_panels, pack_queries, run_group_influence

__all__ = ["group_influence_op", "pack_queries_op"]

# At module level: if a Library is collected while somebody holds its op, the process crashes.
_LIBRARY = torch.library.Library("tikmix_fast", "DEF")
_LIBRARY.define(
    "group_influence(Tensor input, Tensor grad_output, Tensor offsets, Tensor queries, Tensor? panels, Tensor? order, "
    "Tensor(a!)? grad_weight, str? backend) -> Tensor"
)
_LIBRARY.define("pack_queries(Tensor queries) -> Tensor")
group_influence_op = torch.ops.tikmix_fast.group_influence.default
pack_queries_op = torch.ops.tikmix_fast.pack_queries.default


def _group_influence_fake(
    input: Tensor,
    grad_output: Tensor,
    offsets: Tensor,
    queries: Tensor,
    panels: Tensor | None,
    order: Tensor | None,
    grad_weight: Tensor | None,
    backend: str | None,
) -> Tensor:
    check_arguments(Arguments(input, grad_output, offsets, queries, panels, order, grad_weight))
    return input.new_empty((queries.shape[0], offsets.shape[0] - 1), dtype=torch.float64)


def _group_influence_autograd(
    input: Tensor,
    grad_output: Tensor,
    offsets: Tensor,
    queries: Tensor,
    panels: Tensor | None,
    order: Tensor | None,
    grad_weight: Tensor | None,
    backend: str | None,
) -> Tensor:
    tensors = {"input": input, "grad_output": grad_output, "queries": queries, "grad_weight": grad_weight}
    refuse_derivatives("group_influence", tensors)
    with torch._C._AutoDispatchBelowAutograd():
        values: Tensor = group_influence_op(input, grad_output, offsets, queries, panels, order, grad_weight, backend)
    return values


_LIBRARY.impl("pack_queries", pack_queries, "CompositeExplicitAutograd")
torch.library.register_fake("tikmix_fast::pack_queries", empty_panels, lib=_LIBRARY)
_LIBRARY.impl("group_influence", run_group_influence, "CompositeExplicitAutograd")
_LIBRARY.impl("group_influence", _group_influence_autograd, "Autograd")
torch.library.register_fake("tikmix_fast::group_influence", _group_influence_fake, lib=_LIBRARY)
