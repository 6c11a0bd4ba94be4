"""Make an op known to torch: its schema, its shape for tracing, and a refusal to differentiate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from tikmix_fast.ops.common.checks import Arguments, refuse_derivatives
from tikmix_fast.ops.common.projected_checks import ProjectedArguments

__all__ = ["register"]

_Arguments = TypeVar("_Arguments", Arguments, ProjectedArguments)


def register(
    library: torch.library.Library,
    schema: str,
    kind: Callable[..., _Arguments],
    check: Callable[[_Arguments], None],
    run: Callable[[_Arguments, str | None], Tensor],
    tensors: Mapping[str, str],
) -> Any:
    """Define an op that returns influence [n, m], and return it.

    Parameters
    ----------
    library : torch.library.Library
    schema : str
        The arguments are those of ``kind``, then the backend.
    kind : type
    check : callable (arguments) -> None
        Checks shapes, dtypes and devices, without reading a value.
    run : callable (arguments, backend) -> Tensor
    tensors : mapping of str to str
        The arguments by which the op has no derivative, by their names in messages.
    """
    name = schema.partition("(")[0]
    library.define(schema)
    op = getattr(torch.ops.tikmix_fast, name).default

    def compute(*values: Any) -> Tensor:
        return run(kind(*values[:-1]), values[-1])

    def fake(*values: Any) -> Tensor:
        arguments = kind(*values[:-1])
        check(arguments)
        return arguments.input.new_empty((len(arguments.queries), len(arguments.offsets) - 1), dtype=torch.float64)

    def autograd(*values: Any) -> Any:
        arguments = kind(*values[:-1])
        refuse_derivatives(name, {word: getattr(arguments, field) for word, field in tensors.items()})
        with torch._C._AutoDispatchBelowAutograd():
            return op(*values)

    library.impl(name, compute, "CompositeExplicitAutograd")
    library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"tikmix_fast::{name}", fake, lib=library)
    return op
