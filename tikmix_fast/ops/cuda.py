"""The native CUDA backend. This version has the build switch but no kernel yet, and says so."""

from __future__ import annotations

__all__ = ["unavailable"]


def unavailable() -> str:
    """Return why the CUDA kernel cannot be used here."""
    return "no CUDA kernel in this version yet"
