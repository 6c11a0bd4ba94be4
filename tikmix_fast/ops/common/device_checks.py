"""Checks of offsets and order on a GPU, where reading them would make the host wait.

If they are wrong, the kernels stay inside their memory, write NaN, and set bits in a flag on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tikmix_fast.ops.common.checks import domain_bounds

__all__ = [
    "WRONG_OFFSETS",
    "WRONG_ORDER",
    "clamped_offsets",
    "device_offsets",
    "error_flag",
    "mark_errors",
    "raise_on_device_errors",
]

WRONG_OFFSETS = 1
WRONG_ORDER = 2
_MESSAGES = {
    WRONG_OFFSETS: "offsets must start at 0, never decrease and end at the number of rows",
    WRONG_ORDER: "order must be a permutation of the row numbers",
}

_flags: dict[torch.device, Tensor] = {}


def error_flag(device: torch.device) -> Tensor:
    """Return the flag of a device, int32 [1]: the bits of everything that was wrong since the flag was last read."""
    if device not in _flags:
        if _is_capturing(device):
            raise RuntimeError(
                "the first call on a device allocates its error flag, which a CUDA graph cannot capture; "
                "run the call once before it is captured"
            )
        _flags[device] = torch.zeros(1, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # once: other streams write to it
    return _flags[device]


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def device_offsets(offsets: Tensor, rows: int, device: torch.device) -> Tensor:
    """Return the offsets contiguous and on the device. Offsets on the CPU are checked first.

    Raises
    ------
    ValueError
        If offsets on the CPU do not cut ``rows`` rows into consecutive domains.
    RuntimeError
        If they are on the CPU while a CUDA graph is captured: the graph would copy from freed memory.
    """
    if offsets.device.type == "cpu":
        domain_bounds(offsets, rows)
        if _is_capturing(device):
            raise RuntimeError("offsets must be on the GPU while a graph is captured; copy them there before")
    return offsets.to(device, non_blocking=True).contiguous()


def clamped_offsets(offsets: Tensor, rows: int) -> Tensor:
    """Return offsets forced into ``0 ... rows`` and never decreasing. Right offsets stay as they are."""
    return offsets.clamp(0, rows).cummax(0).values


def mark_errors(values: Tensor, offsets: Tensor, order: Tensor | None, rows: int) -> Tensor:
    """Return the values. If offsets or order are wrong, return NaN for all of them and set the flag of the device.

    For results of torch's kernels; ours check while they run. Does not wait for the device.
    """
    wrong_offsets = (offsets[0] != 0) | (offsets[-1] != rows) | (offsets.diff() < 0).any()
    bits = wrong_offsets * WRONG_OFFSETS
    if order is not None and rows:
        low, high = torch.aminmax(order)
        bits = bits + ((low < 0) | (high >= rows)) * WRONG_ORDER
    error_flag(values.device).bitwise_or_(bits.int())
    return torch.where(bits == 0, values, torch.nan)


def raise_on_device_errors() -> None:
    """Raise if a kernel on a GPU met wrong offsets or a wrong order since the last call of this function.

    Waits for every GPU on which a kernel ran.

    Raises
    ------
    ValueError
        Saying what was wrong, on which device. The result of that call is NaN.
    """
    messages = []
    for device, flag in _flags.items():
        bits = int(flag.item())
        if bits:
            flag.zero_()
            messages += [f"{message} (on {device})" for bit, message in _MESSAGES.items() if bits & bit]
    if messages:
        raise ValueError(
            f"{'; '.join(messages)}; a call since the last check got something else, and its result is NaN"
        )
