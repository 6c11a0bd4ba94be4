"""The ways to compute influence that are compared on a GPU: those of `tikmix_fast.benchmarking.baselines`, and ours."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tikmix_fast import ops
from tikmix_fast.benchmarking.baselines import Answer, Layer, Method, exact_methods, projected_methods
from tikmix_fast.ops.common.checks import Arguments

__all__ = ["AUTOMATIC", "gpu_methods"]

AUTOMATIC = "tikmix_fast"
"""Ours as it is called without choosing anything."""

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
    """One of our ways, forced: a function of `Arguments`, and where its backend says what it does not take."""

    backend: str | None  # None: torch's own
    module: str
    function: str
    refuses: str
    kernel: str | None = None


_WAYS = {
    "cuda fused": _Way("cuda", "tikmix_fast.ops.backends.cuda.exact", "fused", "tikmix_fast.ops.backends.cuda"),
    "cuda fused, mma": _Way(
        "cuda", "tikmix_fast.ops.backends.cuda.exact", "fused", "tikmix_fast.ops.backends.cuda", "mma"
    ),
    "vendor two-pass": _Way(
        None, "tikmix_fast.ops.backends.cuda.grouped_mm", "group_influence", "tikmix_fast.ops.backends.cuda.grouped_mm"
    ),
    "triton fused": _Way(
        "triton", "tikmix_fast.ops.backends.triton.fused", "group_influence", "tikmix_fast.ops.backends.triton"
    ),
    "triton two-pass": _Way(
        "triton", "tikmix_fast.ops.backends.triton.two_pass", "group_influence", "tikmix_fast.ops.backends.triton"
    ),
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
    """Give ours offsets that lie on the device already; loops over domains need them on the host."""
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


@contextmanager
def _forced_kernel(name: str) -> Iterator[None]:
    before = os.environ.get(_KERNEL_VARIABLE)
    os.environ[_KERNEL_VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[_KERNEL_VARIABLE]
        else:
            os.environ[_KERNEL_VARIABLE] = before


def _forcing(way: _Way) -> Any:
    return _forced_kernel(way.kernel) if way.kernel else nullcontext()


def _refusal_of_way(way: _Way, layer: Layer) -> str | None:
    reason = ops.available_backends()[way.backend] if way.backend else None
    if reason is not None:
        return reason
    try:
        getattr(import_module(way.module), way.function)
        refused: str | None = import_module(way.refuses).refusal(_arguments(layer, None, None))
    except (ImportError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    if refused is None and way.kernel and torch.cuda.get_device_capability(layer.input.device) != (9, 0):
        return f"{way.kernel} is what is fused here anyway"
    return refused


def _prepare_way(way: _Way, layer: Layer) -> Callable[[], Answer]:
    function = getattr(import_module(way.module), way.function)
    total = layer.input.new_zeros(layer.queries.shape[1:], dtype=torch.float32)
    with _forcing(way):
        arguments = _arguments(layer, ops.pack_queries(layer.queries).panels, total)

    def run() -> Answer:
        with _forcing(way):
            return Answer(function(arguments), total)

    return run
