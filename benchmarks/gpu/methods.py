"""The methods that compete on a GPU: baselines of `tikmix_fast.benchmarking`, and every way of ours."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.forced import environment_variable
from tikmix_fast import ops
from tikmix_fast.benchmarking.baselines import Answer, Layer, Method, exact_methods, projected_methods
from tikmix_fast.ops.backends import cuda, triton
from tikmix_fast.ops.backends.cuda import exact, grouped_mm
from tikmix_fast.ops.common.checks import Arguments

__all__ = ["AUTOMATIC", "gpu_methods"]

AUTOMATIC = "tikmix_fast"
"""Our kernel with the automatic choice of backend."""

_BASELINES = (
    "plain weight gradient",
    "torch, domain by domain",
    "torch, stacked + GEMM",
    "grouped_mm + GEMM",
    "panels of 128, two passes",
    "row-wise (ghost)",
)
_KERNEL_VARIABLE = "TIKMIX_FAST_CUDA_KERNEL"


class _Way(NamedTuple):
    """One of our ways, forced.

    Attributes
    ----------
    backend : str or None
        None for torch's own.
    call : callable (Arguments) -> Tensor [n, m]
    refusal : callable (Arguments) -> str or None
        Why the way does not take the arguments.
    kernel : str or None
        Value of TIKMIX_FAST_CUDA_KERNEL during the call.
    """

    backend: str | None
    call: Callable[[Arguments], Tensor]
    refusal: Callable[[Arguments], str | None]
    kernel: str | None = None

    def forcing(self) -> AbstractContextManager[None]:
        return environment_variable(_KERNEL_VARIABLE, self.kernel) if self.kernel else nullcontext()


def _triton_fused(arguments: Arguments) -> Tensor:
    from tikmix_fast.ops.backends.triton.fused import group_influence

    return group_influence(arguments)


def _triton_two_pass(arguments: Arguments) -> Tensor:
    from tikmix_fast.ops.backends.triton.two_pass import group_influence

    return group_influence(arguments)


_WAYS = {
    "cuda fused": _Way("cuda", exact.fused, cuda.refusal),
    "cuda fused, mma": _Way("cuda", exact.fused, cuda.refusal, "mma"),
    "vendor two-pass": _Way(None, grouped_mm.group_influence, grouped_mm.refusal),
    "triton fused": _Way("triton", _triton_fused, triton.refusal),
    "triton two-pass": _Way("triton", _triton_two_pass, triton.refusal),
}


def gpu_methods(projection: int | None = None) -> dict[str, Method]:
    """Return the methods by name, the plain weight gradient first.

    Parameters
    ----------
    projection : int or None
        k of projected influence; None for the exact methods.
    """
    if projection:
        return {name: _with_device_offsets(method) for name, method in projected_methods(projection).items()}
    every = exact_methods()
    methods = {name: every[name] for name in _BASELINES}
    for name in (AUTOMATIC, f"{AUTOMATIC}, influence only"):
        methods[name] = _with_device_offsets(every[name]._replace(refusal=_no_backend))
    for name, way in _WAYS.items():
        methods[f"{AUTOMATIC}, {name}"] = Method(partial(_prepare_way, way), partial(_refusal_of_way, way), ours=True)
    return methods


def _with_device_offsets(method: Method) -> Method:
    """Give our methods offsets on the device; a baseline loops over domains and needs them on the host."""
    if not method.ours:
        return method

    def prepare(layer: Layer) -> Callable[[], Answer]:
        return method.prepare(replace(layer, offsets=layer.offsets.to(layer.input.device)))

    return method._replace(prepare=prepare)


def _no_backend(layer: Layer) -> str | None:
    reasons = ops.available_backends()
    names = ("cuda", "triton") if layer.input.device.type == "cuda" else ("cpu",)
    if any(reasons[name] is None for name in names):
        return None
    return "; ".join(f"{name}: {reasons[name]}" for name in names)


def _arguments(layer: Layer, panels: Tensor | None, total: Tensor | None) -> Arguments:
    offsets = layer.offsets.to(layer.input.device)
    return Arguments(layer.input, layer.grad_output, offsets, layer.queries, panels, None, total)


def _refusal_of_way(way: _Way, layer: Layer) -> str | None:
    reason = ops.available_backends()[way.backend] if way.backend else None
    reason = reason or way.refusal(_arguments(layer, None, None))
    if reason is None and way.kernel and torch.cuda.get_device_capability(layer.input.device) != (9, 0):
        return f"{way.kernel} is the fused kernel of this device anyway"
    return reason


def _prepare_way(way: _Way, layer: Layer) -> Callable[[], Answer]:
    total = layer.input.new_zeros(layer.queries.shape[1:], dtype=torch.float32)
    with way.forcing():
        arguments = _arguments(layer, ops.pack_queries(layer.queries).panels, total)

    def run() -> Answer:
        with way.forcing():
            return Answer(way.call(arguments), total)

    return run
