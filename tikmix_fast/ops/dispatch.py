"""Pick the backend of a call: the argument, else `use_backend`, else TIKMIX_FAST_BACKEND, else the best usable one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from tikmix_fast.ops.backends import cpu, cuda, reference, triton
from tikmix_fast.ops.common.checks import Arguments, check_arguments, check_grad_weight_memory
from tikmix_fast.ops.common.projected_checks import ProjectedArguments, check_projected_arguments

__all__ = [
    "available_backends",
    "empty_panels",
    "pack_queries",
    "run_group_influence",
    "run_projected_domain_gradients",
    "run_projected_group_influence",
    "use_backend",
]

ENVIRONMENT_VARIABLE = "TIKMIX_FAST_BACKEND"

_log = logging.getLogger("tikmix_fast.ops")


class _Backend(Protocol):
    """What the package of every backend offers."""

    def unavailable(self) -> str | None:
        """Return why it cannot run on this machine, or None."""

    def refusal(self, arguments: Arguments | ProjectedArguments) -> str | None:
        """Return why it cannot take this call, or None."""

    def group_influence(self, arguments: Arguments) -> Tensor: ...
    def projected_group_influence(self, arguments: ProjectedArguments) -> Tensor: ...
    def projected_domain_gradients(self, arguments: ProjectedArguments) -> Tensor: ...


_BACKENDS: Mapping[str, _Backend] = {"reference": reference, "cpu": cpu, "triton": triton, "cuda": cuda}
# What the automatic choice tries on each kind of device, best first. The reference takes all other calls.
_PREFERRED = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

# For the process, not a context variable: backward runs in autograd's own threads, which must see the choice.
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

    The choice holds for the whole process, because autograd runs backward in threads of its own.

    Parameters
    ----------
    name : str
        One of the keys of `available_backends`.

    Raises
    ------
    ValueError
        If no backend has this name.
    RuntimeError
        Inside a function that is being compiled. The op reads the choice when it runs, so enter the context around the
        compiled call.

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


def pack_queries(queries: Tensor) -> Tensor:
    """Copy queries into the order of the native kernel for their device; an empty vector if it does not take them."""
    return cuda.pack_queries(queries) if queries.is_cuda else cpu.pack_queries(queries)


def empty_panels(queries: Tensor) -> Tensor:
    """Return the uninitialized result of `pack_queries`, for tracing."""
    return cuda.empty_panels(queries) if queries.is_cuda else cpu.empty_panels(queries)


def run_group_influence(arguments: Arguments, backend: str | None) -> Tensor:
    """Check the arguments of ``group_influence`` and run it in one backend."""
    check_arguments(arguments)
    check_grad_weight_memory(arguments)
    with torch.autocast(arguments.input.device.type, enabled=False):
        return _BACKENDS[_choose(backend, arguments)].group_influence(arguments)


def run_projected_group_influence(arguments: ProjectedArguments, backend: str | None) -> Tensor:
    """Check the arguments of ``projected_group_influence`` and run it in one backend."""
    check_projected_arguments(arguments)
    with torch.autocast(arguments.input.device.type, enabled=False):
        return _BACKENDS[_choose(backend, arguments)].projected_group_influence(arguments)


def run_projected_domain_gradients(arguments: ProjectedArguments) -> Tensor:
    """Check the arguments of ``projected_domain_gradients``, which have no queries, and run it in one backend."""
    check_projected_arguments(arguments)
    with torch.autocast(arguments.input.device.type, enabled=False):
        return _BACKENDS[_choose(None, arguments)].projected_domain_gradients(arguments)
