"""All private names of torch that influence uses, so that a new torch version can break only this file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "current_scale",
    "in_backward",
    "input_shape",
    "norms",
    "run_compiled_as_written",
    "saved",
    "steps_in_backward",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "uncompiled",
    "without_memory",
    "without_subclass_dispatch",
]

tree_flatten: Callable[..., Any] = torch.utils._pytree.tree_flatten
tree_leaves: Callable[..., Any] = torch.utils._pytree.tree_leaves
tree_map: Callable[..., Any] = torch.utils._pytree.tree_map
tree_unflatten: Callable[..., Any] = torch.utils._pytree.tree_unflatten


def in_backward() -> bool:
    """Whether this thread runs a backward, in which checkpointing may recompute a forward."""
    return torch._C._current_graph_task_id() != -1


def without_subclass_dispatch() -> AbstractContextManager[Any]:
    """Treat tensor subclasses as plain tensors inside."""
    context: AbstractContextManager[Any] = torch._C.DisableTorchFunctionSubclass()
    return context


def run_compiled_as_written() -> AbstractContextManager[Any]:
    """Run compiled models eagerly inside, because compiled graphs use the ordinary parameters.

    If nothing was compiled in this process, torch's compiler is not even imported.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model behind ``torch.compile``, or the model itself.

    Examples
    --------
    >>> model = nn.Linear(2, 2)
    >>> uncompiled(model) is model
    True
    """
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def steps_in_backward(parameter: Tensor) -> bool:
    """Whether the parameter has a post-accumulate hook, as optimizers have that step inside the backward."""
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def current_scale(scaler: Any) -> Tensor | None:
    """Return a GradScaler's scale without waiting for the device; None if its scale is not a tensor."""
    scale = getattr(scaler, "_scale", None)
    return scale if isinstance(scale, Tensor) else None


def norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the 2-norms of tensors of one device and dtype, [len(tensors)], computed in ``dtype``.

    Examples
    --------
    >>> norms([torch.tensor([3.0, 4.0])], torch.float64)
    tensor([5.], dtype=torch.float64)
    """
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=dtype))


def input_shape(node: Any, index: int) -> tuple[int, ...]:
    """Return the shape of one output of the forward of an autograd node."""
    return tuple(int(size) for size in node._input_metadata[index].shape)


def saved(node: Any, name: str) -> Any:
    """Return the value that an autograd node saved under this name, or None."""
    return getattr(node, f"_saved_{name}", None)


def without_memory() -> AbstractContextManager[Any]:
    """Give tensors made inside a shape, dtype and device, but no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()
