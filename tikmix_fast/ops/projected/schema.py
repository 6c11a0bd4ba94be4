"""The projected op as torch sees it."""

from __future__ import annotations

import torch

from tikmix_fast.ops.common.projected_checks import ProjectedArguments, check_projected_arguments
from tikmix_fast.ops.common.registration import register
from tikmix_fast.ops.dispatch import run_projected_group_influence

__all__ = ["projected_group_influence_op"]

# At module level: if a Library is collected while somebody holds its op, the process crashes.
_LIBRARY = torch.library.Library("tikmix_fast", "FRAGMENT")
projected_group_influence_op = register(
    _LIBRARY,
    "projected_group_influence(Tensor input, Tensor grad_output, Tensor offsets, Tensor queries, "
    "Tensor output_factor, Tensor input_factor, float scale, Tensor? order, str? backend) -> Tensor",
    ProjectedArguments,
    check_projected_arguments,
    run_projected_group_influence,
    {name: name for name in ("input", "grad_output", "queries")}
    | {"projection to k_out": "output_factor", "projection to k_in": "input_factor"},
)
