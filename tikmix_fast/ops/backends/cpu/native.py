"""The native module `tikmix_fast._cpu`: whether it can run, which calls it takes, and with which instruction set."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from tikmix_fast.ops.common.checks import Arguments
from tikmix_fast.ops.common.projected_checks import ProjectedArguments

try:  # after torch, so that both use the one OpenMP runtime that torch brings
    from tikmix_fast import _cpu as module
except ImportError as error:
    missing: str | None = f"the native module tikmix_fast._cpu cannot be imported ({error}); reinstall tikmix_fast"
else:
    missing = None

__all__ = [
    "DTYPES",
    "DTYPE_CODES",
    "INSTRUCTION_SET_VARIABLE",
    "chosen_instruction_set",
    "instruction_sets",
    "matrix_argument",
    "missing",
    "module",
    "refusal",
    "unavailable",
]

INSTRUCTION_SET_VARIABLE = "TIKMIX_FAST_CPU_ISA"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


def unavailable() -> str | None:
    """Return why the native kernels cannot run here, or None."""
    return missing


def refusal(arguments: Arguments | ProjectedArguments) -> str | None:
    """Return why the native kernels cannot take this call, or None."""
    for name in ("input", "grad_output", "queries", "grad_weight"):
        tensor: Tensor | None = getattr(arguments, name, None)
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}, not on the CPU"
        if tensor.dtype not in DTYPE_CODES:
            return f"{name} is {tensor.dtype}, none of float32, bfloat16 and float16"
    return None


def instruction_sets() -> list[str]:
    """Return the instruction sets that were compiled in and that this processor has, best first."""
    return [] if missing else module.instruction_sets()


def chosen_instruction_set() -> str:
    """Return the best instruction set, or the one that the environment variable forces."""
    usable = instruction_sets()
    forced = os.environ.get(INSTRUCTION_SET_VARIABLE)
    if not forced:
        return usable[0]
    if forced not in usable:
        raise ValueError(
            f"{INSTRUCTION_SET_VARIABLE} must be one of {', '.join(usable)} on this machine; got {forced!r}"
        )
    return forced


def matrix_argument(tensor: Tensor) -> tuple[int, int, int, int]:
    """Return address, dtype code and strides, as the native module takes a matrix."""
    row_stride, column_stride = tensor.stride()[-2:]
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], row_stride, column_stride
