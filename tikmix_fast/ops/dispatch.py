"""Which backend runs a call: the argument, else `use_backend`, else TIKMIX_FAST_BACKEND, else the best one that can."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from tikmix_fast.ops.backends import projected_rows as projected_kernels
from tikmix_fast.ops.backends import reference, triton
from tikmix_fast.ops.backends.cpu import cpu
from tikmix_fast.ops.backends.cuda import cuda
from tikmix_fast.ops.common.checks import Arguments, check_arguments, check_grad_weight_memory
from tikmix_fast.ops.common.projected_checks import ProjectedArguments, check_projected_arguments

__all__ = [
    "available_backends",
    "run_group_influence",
    "run_projected_domain_gradients",
    "run_projected_group_influence",
    "use_backend",
]

ENVIRONMENT_VARIABLE = "TIKMIX_FAST_BACKEND"

_log = logging.getLogger("tikmix_fast.ops")


class _Backend(NamedTuple):
    unavailable: Callable[[], str | None]  # why it cannot run on this machine
    refusal: Callable[[Arguments | ProjectedArguments], str | None]  # why it cannot take this call
    group_influence: Callable[[Arguments], Tensor]
    projected_group_influence: Callable[[ProjectedArguments], Tensor]
    projected_domain_gradients: Callable[[ProjectedArguments], Tensor]


_BACKENDS = {
    "reference": _Backend(
        reference.unavailable,
        reference.refusal,
        reference.group_influence,
        projected_kernels.reference,
        projected_kernels.domain_gradients,
    ),
    "cpu": _Backend(
        cpu.unavailable, cpu.refusal, cpu.group_influence, projected_kernels.cpu, projected_kernels.domain_gradients
    ),
    "triton": _Backend(
        triton.unavailable,
        triton.refusal,
        triton.group_influence,
        triton.projected_group_influence,
        triton.projected_domain_gradients,
    ),
    "cuda": _Backend(
        cuda.unavailable,
        cuda.refusal,
        cuda.group_influence,
        cuda.projected_group_influence,
        cuda.projected_domain_gradients,
    ),
}
# What the automatic choice tries on each kind of device, best first; the reference takes whatever is left.
_PREFERRED = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

# Process-wide and not a context variable: backward runs in autograd's own threads, which must see the choice.
_chosen: list[str] = []
_logged: set[tuple[str, str]] = set()


def available_backends() -> dict[str, str | None]:
    """List every backend with the reason why it cannot be used here, or None if it can.

    Returns
    -------
    dict of str to str or None
        Keys: ``reference``, ``cpu``, ``triton``, ``cuda``.

    Examples
    --------
    >>> available_backends()["reference"] is None
    True
    """
    return {name: backend.unavailable() for name, backend in _BACKENDS.items()}


def _check_name(name: str, source: str) -> None:
    if name not in _BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(_BACKENDS)}; got {name!r}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the context with one backend, unless a call names another.

    The choice holds for the whole process, so that it reaches the threads in which autograd runs backward.

    Parameters
    ----------
    name : str
        One of the keys of `available_backends`.

    Raises
    ------
    ValueError
        If there is no backend of this name.
    RuntimeError
        Inside a function that is being compiled: the choice is read when the op runs, so make it around the call.

    Examples
    --------
    >>> import torch
    >>> from tikmix_fast import ops
    >>> with ops.use_backend("reference"):
    ...     ops.group_influence(torch.ones(2, 1), torch.ones(2, 1), torch.tensor([0, 2]), torch.ones(1, 1, 1))
    tensor([[2.]], dtype=torch.float64)
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("use_backend must be entered outside the compiled function; pass backend= inside it")
    _check_name(name, "backend")
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


def _requested(argument: str | None) -> tuple[str, str] | None:
    if argument is not None:
        return argument, "backend"
    if _chosen:
        return _chosen[-1], "use_backend"
    variable = os.environ.get(ENVIRONMENT_VARIABLE)
    return (variable, ENVIRONMENT_VARIABLE) if variable else None


def _why_not(name: str, arguments: Arguments | ProjectedArguments) -> str | None:
    return _BACKENDS[name].unavailable() or _BACKENDS[name].refusal(arguments)


def _choose(argument: str | None, arguments: Arguments | ProjectedArguments) -> str:
    request = _requested(argument)
    if request is not None:
        name, source = request
        _check_name(name, source)
        if _why_not(name, arguments) is not None:
            reasons = "\n".join(f"  {other}: {_why_not(other, arguments) or 'usable'}" for other in _BACKENDS)
            raise RuntimeError(f"the backend {name!r} asked for by {source} cannot run this call; backends:\n{reasons}")
        return name
    for name in _PREFERRED.get(arguments.input.device.type, ()):
        reason = _why_not(name, arguments)
        if reason is None:
            return name
        if (name, reason) not in _logged:
            _logged.add((name, reason))
            _log.info("the backend %s is passed over: %s", name, reason)
    return "reference"


def run_group_influence(
    input: Tensor,
    grad_output: Tensor,
    offsets: Tensor,
    queries: Tensor,
    panels: Tensor | None,
    order: Tensor | None,
    grad_weight: Tensor | None,
    backend: str | None,
) -> Tensor:
    """Check the arguments of ``group_influence`` and run it; this is the kernel that the schema calls."""
    arguments = Arguments(input, grad_output, offsets, queries, panels, order, grad_weight)
    check_arguments(arguments)
    check_grad_weight_memory(arguments)
    with torch.autocast(input.device.type, enabled=False):
        return _BACKENDS[_choose(backend, arguments)].group_influence(arguments)


def run_projected_group_influence(
    input: Tensor,
    grad_output: Tensor,
    offsets: Tensor,
    queries: Tensor,
    output_factor: Tensor,
    input_factor: Tensor,
    scale: float,
    order: Tensor | None,
    backend: str | None,
) -> Tensor:
    """Check the arguments of ``projected_group_influence`` and run it; this is the kernel that the schema calls."""
    arguments = ProjectedArguments(input, grad_output, offsets, queries, output_factor, input_factor, scale, order)
    check_projected_arguments(arguments)
    with torch.autocast(input.device.type, enabled=False):
        return _BACKENDS[_choose(backend, arguments)].projected_group_influence(arguments)


def run_projected_domain_gradients(arguments: ProjectedArguments) -> Tensor:
    """Check the arguments of ``projected_domain_gradients``, of no query, and run it."""
    check_projected_arguments(arguments)
    with torch.autocast(arguments.input.device.type, enabled=False):
        return _BACKENDS[_choose(None, arguments)].projected_domain_gradients(arguments)
