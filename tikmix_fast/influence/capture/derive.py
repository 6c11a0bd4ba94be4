"""Operations on parameters before they meet the data, and the broadcast with which they meet it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tikmix_fast.influence.capture.gathered_rows import refuse_gathered_rows
from tikmix_fast.influence.capture.sink import OpenCapture
from tikmix_fast.influence.capture.taps import spread
from tikmix_fast.influence.capture.views import ParameterView, UncapturedParameterError, plain
from tikmix_fast.influence.torch_private import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = [
    "ELEMENTWISE",
    "apply_elementwise",
    "apply_other",
    "derive",
    "first_view",
    "meets_data",
    "named",
    "refusal",
    "settle",
    "spread_view",
]


def named(*names: str) -> frozenset[Any]:
    """Return the functions with these names in torch, torch.Tensor and torch.nn.functional."""
    homes = (torch, torch.Tensor, F)
    return frozenset(getattr(home, name) for name in names for home in homes if hasattr(home, name))


_ARITHMETIC = ("add", "sub", "mul", "div", "truediv", "pow")
ELEMENTWISE = named(
    *("add", "sub", "mul", "div", "true_divide", "rsub", "pow", "addcmul", "addcdiv"),
    *("lerp", "where", "maximum", "minimum"),
    *("add_", "sub_", "mul_", "div_", "addcmul_", "addcdiv_", "lerp_"),
    *(f"__{side}{name}__" for side in ("", "r", "i") for name in _ARITHMETIC),
)
"""Broadcasting arithmetic."""

_KEEPS_ROWS = ELEMENTWISE | named("to", "float", "double", "half", "bfloat16", "type_as", "contiguous", "clone")
_MAKES_ROWS = named("expand", "expand_as", "repeat", "broadcast_to")


def first_view(*values: Any) -> ParameterView:
    """Return the first view among the values."""
    return next(value for value in values if isinstance(value, ParameterView))


def refusal(view: ParameterView, func: Any, why: str) -> UncapturedParameterError:
    """Return the error for a use that cannot be captured; it names the parameters and the way out."""
    sources = list(dict.fromkeys(source.name for source in view.sources))
    names = " and ".join(map(repr, sources[:3])) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")
    return UncapturedParameterError(
        f"the influence of {names} cannot be captured: it enters {getattr(func, '__name__', func)!r}, and {why}. "
        f"Leave it out with exclude=[{view.sources[0].name!r}] (its influence then counts as zero)."
    )


def meets_data(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether any argument is a tensor with a gradient that depends on more than parameters."""
    return any(
        isinstance(each, Tensor) and not isinstance(each, ParameterView) and each.requires_grad
        for each in tree_leaves((args, kwargs))
    )


def spread_view(capture: OpenCapture, view: ParameterView, shape: torch.Size) -> Tensor:
    """Broadcast a view to the shape of the data it meets, and give the sink the gradient of every copy.

    If the batch has one domain, the sink gets the sum over the copies instead.
    """
    sink = capture.sink
    target = view.plain.shape if sink.labels.single is not None else shape
    return spread(view.plain, target, lambda gradient: sink.spread(view, gradient))


def settle(capture: OpenCapture, value: Any, func: Any) -> Any:
    """Return ``value`` as data; if it is a view whose leading dimensions are rows, give the sink its gradient.

    Raises
    ------
    UncapturedParameterError
        If it is a view without rows of the batch.
    """
    if not isinstance(value, ParameterView):
        return value
    if not value.in_rows or not capture.sink.labels.are_features(value.plain.shape[:-1]):
        raise refusal(value, func, "its data argument is a parameter")
    return spread_view(capture, value, value.plain.shape)


def apply_elementwise(capture: OpenCapture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run broadcasting arithmetic: a norm's weight, a bias, a gate, a position embedding."""
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    views = [each for each in tensors if isinstance(each, ParameterView)]
    others = [each for each in tensors if not isinstance(each, ParameterView)]
    shape = torch.broadcast_shapes(*(plain(each).shape for each in tensors))
    labels = capture.sink.labels
    # Frozen activations [B, S, ...] are data for a vector (a norm's weight, a bias). Other tensors without gradient are
    # constants.
    frozen = all(view.plain.ndim < 2 for view in views) and labels.length is not None
    if not meets_data(args, kwargs) and not (
        frozen and any(each.shape == shape and labels.are_rows(each.shape[:-1]) for each in others)
    ):
        return derive(capture, func, args, kwargs)
    if func.__name__.endswith("_") and isinstance(args[0], ParameterView):
        raise refusal(args[0], func, "a parameter must not be changed in place")

    for each in others:
        if each.shape == shape:
            refuse_gathered_rows(each, labels)

    def meet(value: Any) -> Any:
        return spread_view(capture, value, shape) if isinstance(value, ParameterView) else value

    return func(*map(meet, args), **{name: meet(value) for name, value in kwargs.items()})


def apply_other(capture: OpenCapture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation without a rule: allowed before parameters meet data, and for views that are rows already."""
    if not meets_data(args, kwargs):
        return derive(capture, func, args, kwargs)
    for view in tree_leaves((args, kwargs)):
        if isinstance(view, ParameterView) and not view.in_rows:
            raise refusal(view, func, "no rule covers this operation")
    data_args, data_kwargs = tree_map(lambda each: settle(capture, each, func), (args, kwargs))
    return func(*data_args, **data_kwargs)


def derive(capture: OpenCapture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on parameters and constants, and store it, so that queries can be pushed through it."""
    result = func(*plain(args), **plain(kwargs))
    if isinstance(result, (tuple, list)) and result and all(isinstance(each, Tensor) for each in result):
        parts = [_derived(capture, func, args, kwargs, part, index) for index, part in enumerate(result)]
        return type(result)(parts) if type(result) in (tuple, list) else tuple(parts)
    return _derived(capture, func, args, kwargs, result, None)


def _derived(
    capture: OpenCapture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, index: int | None
) -> Any:
    if not isinstance(result, Tensor) or not result.requires_grad:
        return result
    leaves, structure = tree_flatten((args, kwargs))
    views = [each for each in leaves if isinstance(each, ParameterView)]
    counts = [len(view.sources) for view in views]

    def build(*values: Tensor) -> Tensor:
        remaining = list(values)
        rebuilt = iter(
            _rebuild(view, [remaining.pop(0) for _ in range(count)]) for view, count in zip(views, counts, strict=True)
        )
        again_args, again_kwargs = tree_unflatten(
            [next(rebuilt) if isinstance(each, ParameterView) else each for each in leaves], structure
        )
        output = func(*again_args, **again_kwargs)
        part: Tensor = output if index is None else output[index]
        return part

    in_rows = func in _MAKES_ROWS or (func in _KEEPS_ROWS and any(view.in_rows for view in views))
    return ParameterView.make(result, capture, tuple(s for view in views for s in view.sources), build, in_rows)


def _rebuild(view: ParameterView, values: list[Tensor]) -> Tensor:
    return values[0] if view.build is None else view.build(*values)
