"""Checks of offsets and order that lie on a GPU, where reading them would make the host wait.

The kernels read no memory that is not theirs, write NaN where something was wrong, and leave a note on the device.
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
    """Return the note that kernels on a device leave: int32 [1], the bits of what was wrong since it was last read."""
    if device not in _flags:
        if _is_capturing(device):
            raise RuntimeError(
                "run the call once before it is captured: the first one on a device allocates what stays"
            )
        _flags[device] = torch.zeros(1, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # once: other streams write to it
    return _flags[device]


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def device_offsets(offsets: Tensor, rows: int, device: torch.device) -> Tensor:
    """Return the offsets contiguous and on the device; those that are on the CPU are checked on the way.

    Raises
    ------
    ValueError
        If offsets on the CPU do not cut ``rows`` rows into consecutive domains.
    RuntimeError
        If they are on the CPU while a CUDA graph is being captured: it would replay a copy from memory long gone.
    """
    if offsets.device.type == "cpu":
        domain_bounds(offsets, rows)
        if _is_capturing(device):
            raise RuntimeError("offsets must be on the GPU while a graph is captured; copy them there before")
    return offsets.to(device, non_blocking=True).contiguous()


def clamped_offsets(offsets: Tensor, rows: int) -> Tensor:
    """Return offsets that lead to no row outside of ``0 ... rows``, and never back; the same where they are right."""
    return offsets.clamp(0, rows).cummax(0).values


def mark_errors(values: Tensor, offsets: Tensor, order: Tensor | None, rows: int) -> Tensor:
    """Return the values, or NaN for all of them and a note on the device where offsets or order are wrong.

    For kernels of torch's; ours check on their way. Does not wait for the device.
    """
    wrong_offsets = (offsets[0] != 0) | (offsets[-1] != rows) | (offsets.diff() < 0).any()
    bits = wrong_offsets * WRONG_OFFSETS
    if order is not None and rows:
        low, high = torch.aminmax(order)
        bits = bits + ((low < 0) | (high >= rows)) * WRONG_ORDER
    error_flag(values.device).bitwise_or_(bits.int())
    return torch.where(bits == 0, values, torch.nan)


def raise_on_device_errors() -> None:
    """Raise if a kernel on a GPU met wrong offsets or a wrong order since the last call; its result was NaN.

    Waits for every GPU on which a kernel ran; without one, does nothing.

    Raises
    ------
    ValueError
        With what was wrong, on which device.
    """
    found = []
    for device, flag in _flags.items():
        bits = int(flag.item())
        if bits:
            flag.zero_()
            found += [f"{message} (on {device})" for bit, message in _MESSAGES.items() if bits & bit]
    if found:
        raise ValueError(f"{'; '.join(found)}; a call since the last check got something else, and its result is NaN")
