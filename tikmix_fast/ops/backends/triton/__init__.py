"""The Triton backend: on a GPU, or in Triton's interpreter on CPU tensors. Triton is imported by the first call."""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import AbstractContextManager

import numpy
import torch
from torch import Tensor

from tikmix_fast.ops.common.checks import Arguments
from tikmix_fast.ops.common.gpu_cost import count_gpu_costs
from tikmix_fast.ops.common.projected_checks import ProjectedArguments

__all__ = ["group_influence", "projected_domain_gradients", "projected_group_influence", "refusal", "unavailable"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)


def _is_interpreted() -> bool:
    # Triton reads the variable when kernels are defined. This question must not import it.
    configs = sys.modules.get("tikmix_fast.ops.backends.triton.configs")
    return configs.INTERPRETED if configs else os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable() -> str | None:
    """Return why the kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install it, or torch for CUDA, which brings it"
    if torch.cuda.is_available() or _is_interpreted():
        return None
    return "no CUDA device; set TRITON_INTERPRET=1 before the first call to run the kernels in Triton's interpreter"


def refusal(arguments: Arguments | ProjectedArguments) -> str | None:
    """Return why the kernels cannot take this call, or None."""
    device = arguments.input.device
    if device.type not in ("cuda", "cpu"):
        return f"input is on {device}, neither on a GPU nor on the CPU"
    if device.type == "cpu" and not _is_interpreted():
        return "input is on the CPU, where the kernels only run in Triton's interpreter: TRITON_INTERPRET=1"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _OLDEST:
        return f"{device} is older than compute capability 8.0"
    for name in ("input", "grad_output", "queries", "grad_weight"):
        tensor: Tensor | None = getattr(arguments, name, None)
        if tensor is not None and tensor.dtype not in _DTYPES:
            return f"{name} is {tensor.dtype}, none of float32, bfloat16 and float16"
    if isinstance(arguments, ProjectedArguments):
        from tikmix_fast.ops.backends.triton import projected

        return projected.refusal(arguments)
    return None


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: Triton launches on its stream. On a CPU, keep numpy silent, as a GPU is."""
    return torch.cuda.device(device) if device.type == "cuda" else numpy.errstate(all="ignore")


def group_influence(arguments: Arguments) -> Tensor:
    """Compute ``tikmix_fast.ops.group_influence`` in whichever way costs less."""
    from tikmix_fast.ops.backends.triton import fused, two_pass
    from tikmix_fast.ops.backends.triton.configs import capability

    device = arguments.input.device
    costs = count_gpu_costs(
        *arguments.sizes,
        with_total=arguments.grad_weight is not None,
        kernel="triton",
        capability=capability(device),
    )
    with _on(device):
        if costs.cheapest() == "fused":
            return fused.group_influence(arguments)
        return two_pass.group_influence(arguments)


def projected_group_influence(arguments: ProjectedArguments) -> Tensor:
    """Compute ``tikmix_fast.ops.projected_group_influence`` in one pass over the rows."""
    from tikmix_fast.ops.backends.triton import projected

    with _on(arguments.input.device):
        return projected.projected_group_influence(arguments)


def projected_domain_gradients(arguments: ProjectedArguments) -> Tensor:
    """Compute ``tikmix_fast.ops.projected_domain_gradients``; only the shape of the queries is read."""
    from tikmix_fast.ops.backends.triton import projected

    with _on(arguments.input.device):
        return projected.projected_domain_gradients(arguments)
