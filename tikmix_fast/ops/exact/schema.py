"""The exact ops as torch sees them."""

from __future__ import annotations

import torch

from tikmix_fast.ops.common.checks import Arguments, check_arguments
from tikmix_fast.ops.common.registration import register
from tikmix_fast.ops.dispatch import empty_panels, pack_queries, run_group_influence

__all__ = ["group_influence_op", "pack_queries_op"]

# At module level: if a Library is collected while somebody holds its op, the process crashes.
_LIBRARY = torch.library.Library("tikmix_fast", "DEF")
_LIBRARY.define("pack_queries(Tensor queries) -> Tensor")
_LIBRARY.impl("pack_queries", pack_queries, "CompositeExplicitAutograd")
torch.library.register_fake("tikmix_fast::pack_queries", empty_panels, lib=_LIBRARY)
pack_queries_op = torch.ops.tikmix_fast.pack_queries.default
group_influence_op = register(
    _LIBRARY,
    "group_influence(Tensor input, Tensor grad_output, Tensor offsets, Tensor queries, Tensor? panels, Tensor? order, "
    "Tensor(a!)? grad_weight, str? backend) -> Tensor",
    Arguments,
    check_arguments,
    run_group_influence,
    {name: name for name in ("input", "grad_output", "queries", "grad_weight")},
)
