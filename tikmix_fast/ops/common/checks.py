"""Checks of the arguments of the ops: shapes and dtypes, also on fake tensors, and values on real ones."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "Arguments",
    "check_arguments",
    "check_grad_weight_memory",
    "check_order",
    "check_rows",
    "describe",
    "domain_bounds",
    "refuse_derivatives",
    "require_floating",
    "require_rows",
    "require_shape",
]


class Arguments(NamedTuple):
    """The tensors of one ``group_influence`` call, in the order of its schema."""

    input: Tensor
    grad_output: Tensor
    offsets: Tensor
    queries: Tensor
    panels: Tensor | None
    order: Tensor | None
    grad_weight: Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """T, O, I, m and n."""
        tasks, height, width = self.queries.shape
        return len(self.input), height, width, len(self.offsets) - 1, tasks


def describe(tensor: Tensor) -> str:
    """Return shape, dtype and device of a tensor for an error message."""
    return f"{tuple(tensor.shape)} [{str(tensor.dtype).removeprefix('torch.')}, {tensor.device}]"


def require_shape(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raise ValueError unless a tensor has this shape; a letter stands for any size."""
    matches = tensor.dim() == len(shape) and all(
        isinstance(expected, str) or size == expected for size, expected in zip(tensor.shape, shape, strict=True)
    )
    if not matches:
        raise ValueError(f"{name} must have shape ({', '.join(map(str, shape))}); got {describe(tensor)}")


def require_rows(input: Tensor, grad_output: Tensor) -> tuple[int, int]:
    """Raise ValueError unless the two are matrices of equally many rows; return their columns, O and I."""
    require_shape("input", input, ("T", "I"))
    require_shape("grad_output", grad_output, (input.shape[0], "O"))
    return grad_output.shape[1], input.shape[1]


def require_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless a tensor is floating point."""
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor; got {describe(tensor)}")


def _require_indices(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name} must be int64; got {describe(tensor)}; convert it with .long()")


def check_arguments(arguments: Arguments) -> None:
    """Check shapes, dtypes and devices, without reading a value.

    Raises
    ------
    ValueError
        If shapes disagree, an index tensor is not int64, or the tensors are on different devices.
    TypeError
        If input, grad_output, queries or grad_weight is not floating point.
    """
    input, grad_output, offsets, queries, _, order, grad_weight = arguments
    height, width = require_rows(input, grad_output)
    require_shape("queries", queries, ("n", height, width))
    numbers = {"input": input, "grad_output": grad_output, "queries": queries}
    if grad_weight is not None:
        require_shape("grad_weight", grad_weight, (height, width))
        numbers["grad_weight"] = grad_weight
    check_rows(numbers, offsets, order, {})


def check_rows(
    numbers: Mapping[str, Tensor], offsets: Tensor, order: Tensor | None, factors: Mapping[str, Tensor]
) -> None:
    """Check offsets and order for the rows of ``numbers["input"]``, and that all tensors are on its device.

    Parameters
    ----------
    numbers : mapping of str to Tensor
        Tensors that must be floating point.
    offsets, order
        As in `tikmix_fast.ops.group_influence`.
    factors : mapping of str to Tensor
        Tensors of any dtype.

    Raises
    ------
    ValueError, TypeError
        As `check_arguments`.
    """
    input = numbers["input"]
    require_shape("offsets", offsets, ("m + 1",))
    if offsets.shape[0] == 0:
        raise ValueError(f"offsets must hold m + 1 row numbers, 0 first; got {describe(offsets)}")
    _require_indices("offsets", offsets)
    for name, tensor in numbers.items():
        require_floating(name, tensor)
    same_device = {**numbers, **factors}
    if order is not None:
        require_shape("order", order, (input.shape[0],))
        _require_indices("order", order)
        same_device["order"] = order
    for name, tensor in same_device.items():
        if tensor.device != input.device:
            raise ValueError(f"{name} must be on the device of input, {input.device}; got {describe(tensor)}")
    if offsets.device != input.device and offsets.device.type != "cpu":
        raise ValueError(f"offsets must be on the CPU or on the device of input, {input.device}; got {offsets.device}")


def domain_bounds(offsets: Tensor, rows: int) -> list[int]:
    """Check that the offsets cut ``rows`` rows into consecutive domains, and return them as a list.

    Raises
    ------
    ValueError
        If they do not start at 0, do not end at ``rows``, or decrease.
    """
    bounds: list[int] = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != rows:
        raise ValueError(
            f"offsets must start at 0 and end at T = {rows}; got {bounds[0]} and {bounds[-1]}; "
            "domain j owns the rows offsets[j]:offsets[j + 1]"
        )
    for j, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise ValueError(f"offsets must not decrease; got offsets[{j}] = {start} > offsets[{j + 1}] = {end}")
    return bounds


def check_order(order: Tensor | None, rows: int) -> None:
    """Check that every entry of ``order`` is a row number. The caller promises that no entry repeats.

    Raises
    ------
    ValueError
        If an entry is negative or at least ``rows``.
    """
    if order is None or rows == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(order))
    if low < 0 or high >= rows:
        raise ValueError(f"order must be a permutation of 0 ... {rows - 1}; got entries from {low} to {high}")


def refuse_derivatives(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise RuntimeError if autograd would differentiate ``op``, which has no derivative, by one of the tensors."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{op} has no derivative, but {name} requires grad; call it under torch.no_grad() or pass "
                f"{name}.detach()"
            )
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"{op} has no derivative, but {name} has a tangent; pass its primal value")


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_grad_weight_memory(arguments: Arguments) -> None:
    """Check that ``grad_weight`` can be written: every element has its own memory, which no other argument shares.

    Raises
    ------
    ValueError
        If ``grad_weight`` is expanded onto itself or shares bytes with another argument.
    """
    grad_weight = arguments.grad_weight
    if grad_weight is None or grad_weight.numel() == 0:
        return
    (inner_stride, inner_size), (outer_stride, _) = sorted(
        (stride if size > 1 else 1, size) for size, stride in zip(grad_weight.shape, grad_weight.stride(), strict=True)
    )
    outer_size = grad_weight.numel() // inner_size
    if inner_stride == 0 or (outer_size > 1 and inner_size > 1 and outer_stride < inner_stride * inner_size):
        raise ValueError(
            f"grad_weight must not overlap itself; got strides {grad_weight.stride()} for shape "
            f"{tuple(grad_weight.shape)}; allocate it instead of expanding it"
        )
    start, end = _byte_range(grad_weight)
    for name, tensor in arguments._asdict().items():
        if name == "grad_weight" or tensor is None or tensor.numel() == 0 or tensor.device != grad_weight.device:
            continue
        other_start, other_end = _byte_range(tensor)
        if start < other_end and other_start < end:
            raise ValueError(f"grad_weight must not share memory with {name}; got overlapping tensors; clone one")
