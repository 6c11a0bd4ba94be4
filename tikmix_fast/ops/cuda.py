"""The native CUDA backend. This version has the build switch but no kernel yet, and says so."""

from __future__ import annotations

try:
    from tikmix_fast import _cuda
except ImportError as error:
    _reason = (
        f"not compiled in ({error}), and no CUDA kernel in this version yet; "
        "a build with TIKMIX_FAST_CUDA=ON and nvcc on PATH compiles it"
    )
else:
    _reason = (
        "no CUDA kernel in this version yet; the module was built for "
        f"{_cuda.architectures} with CUDA {'.'.join(map(str, _cuda.toolkit_version))}"
    )

__all__ = ["unavailable"]


def unavailable() -> str:
    """Return why the CUDA kernel cannot be used here."""
    return _reason
