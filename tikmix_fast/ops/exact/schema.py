"""The ops as torch sees them: schema, shapes for tracing, and a refusal where autograd would need a formula."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tikmix_fast.ops.backends.cpu import cpu
from tikmix_fast.ops.backends.cuda import cuda
from tikmix_fast.ops.common.checks import Arguments, check_arguments
from tikmix_fast.ops.dispatch import run_group_influence

__all__ = ["group_influence_op", "pack_queries_op", "refuse_derivatives"]

# Kept at module level: a Library that is collected while its op is still held crashes the process.
_LIBRARY = torch.library.Library("tikmix_fast", "DEF")
_LIBRARY.define(
    "group_influence(Tensor input, Tensor grad_output, Tensor offsets, Tensor queries, Tensor? panels, Tensor? order, "
    "Tensor(a!)? grad_weight, str? backend) -> Tensor"
)
_LIBRARY.define("pack_queries(Tensor queries) -> Tensor")
group_influence_op = torch.ops.tikmix_fast.group_influence.default
pack_queries_op = torch.ops.tikmix_fast.pack_queries.default


def refuse_derivatives(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise RuntimeError if a derivative of ``op`` by one of its arguments is wanted: there is none."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{op} has no derivative, but {name} requires grad; call it under torch.no_grad() or pass "
                f"{name}.detach()"
            )
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"{op} has no derivative, but {name} has a tangent; pass its primal value")


def _pack_queries(queries: Tensor) -> Tensor:
    return cuda.pack_queries(queries) if queries.is_cuda else cpu.pack_queries(queries)


def _pack_queries_fake(queries: Tensor) -> Tensor:
    return cuda.empty_panels(queries) if queries.is_cuda else cpu.empty_panels(queries)


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


_LIBRARY.impl("pack_queries", _pack_queries, "CompositeExplicitAutograd")
torch.library.register_fake("tikmix_fast::pack_queries", _pack_queries_fake, lib=_LIBRARY)
_LIBRARY.impl("group_influence", run_group_influence, "CompositeExplicitAutograd")
_LIBRARY.impl("group_influence", _group_influence_autograd, "Autograd")
torch.library.register_fake("tikmix_fast::group_influence", _group_influence_fake, lib=_LIBRARY)
