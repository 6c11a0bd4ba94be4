"""The projected op as torch sees it: schema, shapes for tracing, and a refusal to differentiate."""

from __future__ import annotations

import torch
from torch import Tensor

from tikmix_fast.ops.common.checks import refuse_derivatives
from tikmix_fast.ops.common.projected_checks import ProjectedArguments, check_projected_arguments
from tikmix_fast.ops.dispatch import run_projected_group_influence

__all__ = ["projected_group_influence_op"]

# At module level: if a Library is collected while somebody holds its op, the process crashes.
_LIBRARY = torch.library.Library("tikmix_fast", "FRAGMENT")
_LIBRARY.define(
    "projected_group_influence(Tensor input, Tensor grad_output, Tensor offsets, Tensor queries, "
    "Tensor output_factor, Tensor input_factor, float scale, Tensor? order, str? backend) -> Tensor"
)
projected_group_influence_op = torch.ops.tikmix_fast.projected_group_influence.default


def _fake(
    input: Tensor,
    grad_output: Tensor,
    offsets: Tensor,
    queries: Tensor,
    output_factor: Tensor,
    input_factor: Tensor,
    scale: float,
    order: Tensor | None,
    backend: str | None,
) -> Tensor:
    check_projected_arguments(
        ProjectedArguments(input, grad_output, offsets, queries, output_factor, input_factor, scale, order)
    )
    return input.new_empty((queries.shape[0], offsets.shape[0] - 1), dtype=torch.float64)


def _autograd(
    input: Tensor,
    grad_output: Tensor,
    offsets: Tensor,
    queries: Tensor,
    output_factor: Tensor,
    input_factor: Tensor,
    scale: float,
    order: Tensor | None,
    backend: str | None,
) -> Tensor:
    tensors = {
        "input": input,
        "grad_output": grad_output,
        "queries": queries,
        "projection to k_out": output_factor,
        "projection to k_in": input_factor,
    }
    refuse_derivatives("projected_group_influence", tensors)
    with torch._C._AutoDispatchBelowAutograd():
        values: Tensor = projected_group_influence_op(
            input, grad_output, offsets, queries, output_factor, input_factor, scale, order, backend
        )
    return values


_LIBRARY.impl("projected_group_influence", run_projected_group_influence, "CompositeExplicitAutograd")
_LIBRARY.impl("projected_group_influence", _autograd, "Autograd")
torch.library.register_fake("tikmix_fast::projected_group_influence", _fake, lib=_LIBRARY)
