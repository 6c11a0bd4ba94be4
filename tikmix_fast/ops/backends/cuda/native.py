"""The native module `tikmix_fast._cuda`: whether it can run on a device, and which rows it takes."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from tikmix_fast import _cuda as module
except ImportError as error:
    missing: str | None = f"not compiled in ({error}); a build with TIKMIX_FAST_CUDA=ON and nvcc on PATH compiles it"
else:
    missing = None

__all__ = [
    "CODES",
    "are_aligned",
    "missing",
    "module",
    "multiprocessors",
    "rows_argument",
    "stream",
    "unavailable",
    "unsupported",
]

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""How the module numbers the dtypes, as csrc/cuda/problem.h does."""

# Rows are copied 16 bytes at a time.
_ALIGNMENT = 16


def unavailable() -> str | None:
    """Return why the kernels cannot run on the current device, or None."""
    if missing:
        return missing
    if not torch.cuda.is_available():
        return f"no CUDA device; the module was built for {module.architectures} with CUDA {_toolkit()}"
    return unsupported(torch.device("cuda", torch.cuda.current_device()))


def _toolkit() -> str:
    return ".".join(map(str, module.toolkit_version))


def unsupported(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device, or None."""
    major, minor = torch.cuda.get_device_capability(device)
    built = [(int(each.rstrip("a")[:-1]), int(each.rstrip("a")[-1])) for each in module.architectures.split()]
    # Machine code runs on later devices of its generation. The last one comes with intermediate code for later ones.
    if any(of == major and at_least <= minor for of, at_least in built) or built[-1] <= (major, minor):
        return None
    return (
        f"built for {module.architectures}, and {device} has compute capability {major}.{minor}; "
        f"build with TIKMIX_FAST_CUDA_ARCHITECTURES={major}{minor}"
    )


def are_aligned(rows: Tensor) -> bool:
    """Return whether every row starts at a multiple of 16 bytes, with its columns side by side."""
    size = rows.element_size()
    apart = rows.stride(0) >= rows.shape[1] and rows.stride(0) * size % _ALIGNMENT == 0
    unit = rows.stride(1) == 1 or rows.shape[1] == 1
    return unit and (apart or len(rows) <= 1) and rows.data_ptr() % _ALIGNMENT == 0


def rows_argument(rows: Tensor) -> tuple[int, int]:
    """Return address and row stride. The stride of a single row is one that a second row could have."""
    whole = -(-rows.shape[1] * rows.element_size() // _ALIGNMENT) * _ALIGNMENT // rows.element_size()
    return rows.data_ptr(), rows.stride(0) if len(rows) > 1 else whole


def stream(device: torch.device) -> int:
    """Return the handle of a device's current stream."""
    return torch.cuda.current_stream(device).cuda_stream


def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count
