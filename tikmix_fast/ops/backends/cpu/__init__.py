"""The native CPU backend."""

from __future__ import annotations

from tikmix_fast.ops.backends.cpu.exact import empty_panels, group_influence, pack_queries
from tikmix_fast.ops.backends.cpu.native import (
    INSTRUCTION_SET_VARIABLE,
    instruction_sets,
    refusal,
    unavailable,
)
from tikmix_fast.ops.backends.cpu.projected import projected_domain_gradients, projected_group_influence

__all__ = [
    "INSTRUCTION_SET_VARIABLE",
    "empty_panels",
    "group_influence",
    "instruction_sets",
    "pack_queries",
    "projected_domain_gradients",
    "projected_group_influence",
    "refusal",
    "unavailable",
]
