"""The native CUDA backend: hands addresses, sizes and strides to `tikmix_fast._cuda`, on the current stream."""

from __future__ import annotations

import torch

from tikmix_fast.ops.backends.cuda import native, projected
from tikmix_fast.ops.backends.cuda.exact import empty_panels, group_influence, pack_queries
from tikmix_fast.ops.backends.cuda.native import unavailable
from tikmix_fast.ops.backends.cuda.projected import projected_domain_gradients, projected_group_influence
from tikmix_fast.ops.common.checks import Arguments
from tikmix_fast.ops.common.projected_checks import ProjectedArguments

__all__ = [
    "empty_panels",
    "group_influence",
    "pack_queries",
    "projected_domain_gradients",
    "projected_group_influence",
    "refusal",
    "unavailable",
]


def refusal(arguments: Arguments | ProjectedArguments) -> str | None:
    """Return why the kernels cannot take this call, or None."""
    input, grad_output = arguments.input, arguments.grad_output
    if input.device.type != "cuda":
        return f"input is on {input.device}, not on a GPU"
    unsupported = native.unsupported(input.device)
    if unsupported:
        return unsupported
    if input.dtype != grad_output.dtype or input.dtype not in (torch.bfloat16, torch.float16):
        return f"input and grad_output are {input.dtype} and {grad_output.dtype}, not both bfloat16 or float16"
    for name, rows in (("input", input), ("grad_output", grad_output)):
        if not native.are_aligned(rows):
            return f"{name} has rows that do not start at multiples of 16 bytes: strides {rows.stride()}"
    if arguments.queries.dtype not in native.CODES:
        return f"queries is {arguments.queries.dtype}, none of float32, bfloat16 and float16"
    if isinstance(arguments, ProjectedArguments):
        return projected.refusal(arguments)
    return None
