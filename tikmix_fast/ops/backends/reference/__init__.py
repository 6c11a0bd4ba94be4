"""The reference backend: plain torch in float64, the truth that every other backend is tested against."""

from __future__ import annotations

from tikmix_fast.ops.backends.reference.exact import group_influence
from tikmix_fast.ops.backends.reference.projected import projected_domain_gradients, projected_group_influence
from tikmix_fast.ops.common.checks import Arguments
from tikmix_fast.ops.common.projected_checks import ProjectedArguments

__all__ = ["group_influence", "projected_domain_gradients", "projected_group_influence", "refusal", "unavailable"]


def unavailable() -> str | None:
    """Return None: torch is always there."""
    return None


def refusal(arguments: Arguments | ProjectedArguments) -> str | None:
    """Return None: the reference takes every floating dtype, device and layout."""
    return None
