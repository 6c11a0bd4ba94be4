"""The native CPU backend: hands pointers, sizes and strides to `tikmix_fast._cpu`."""

from __future__ import annotations

from torch import Tensor

from tikmix_fast.ops.checks import Arguments

__all__ = ["group_influence", "refusal", "unavailable"]


def unavailable() -> str | None:
    """Return why the native kernel cannot be used here, or None."""
    return "the native module tikmix_fast._cpu is not built"


def refusal(arguments: Arguments) -> str | None:
    """Return why the native kernel cannot take this call, or None."""
    return None


def group_influence(arguments: Arguments) -> Tensor:
    """Compute ``tikmix_fast.ops.group_influence`` in native code."""
    raise NotImplementedError
