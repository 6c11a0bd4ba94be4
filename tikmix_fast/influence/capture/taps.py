"""Autograd functions that read the gradients that flow through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["fused_product", "spread", "tap"]


def tap(output: Tensor, read: Callable[..., object], *saved: Tensor) -> Tensor:
    """Return ``output`` unchanged; the backward calls ``read(gradient, *saved)``."""
    same: Tensor = _Tap.apply(output, read, *saved)  # type: ignore[no-untyped-call]
    return same


def spread(value: Tensor, shape: torch.Size, read: Callable[[Tensor], None]) -> Tensor:
    """Return ``value`` broadcast to ``shape``; the backward calls ``read`` with the gradient of all copies."""
    copies: Tensor = _Spread.apply(value, shape, read)  # type: ignore[no-untyped-call]
    return copies


def fused_product(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_out: bool,
    read: Callable[[Tensor, Tensor, Tensor], Tensor | None],
) -> Tensor:
    """Return ``rows @ weight.T + bias``, so that one pass of the kernel gives weight gradient and influence.

    ``weight`` is [O, I], or [I, O] with ``in_out``. The backward calls ``read(gradient, rows, total)`` once, which must
    add the weight gradient to ``total`` and may return the sum of the gradient over all rows, [O].
    """
    output: Tensor = _FusedProduct.apply(rows, weight, bias, in_out, read)  # type: ignore[no-untyped-call]
    return output


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, read: Callable[..., object], *saved: Tensor) -> Tensor:
        ctx.read = read
        ctx.save_for_backward(*saved)
        # Returning an untouched input would make the result a view that later in-place operations refuse.
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Unpack once only: checkpointing recomputes a saved tensor when it is unpacked, and then frees it.
        saved = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            ctx.read(gradient, *saved)
        return (gradient, None, *(None for _ in saved))


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, shape: torch.Size, read: Callable[[Tensor], None]) -> Tensor:
        ctx.read, ctx.shape = read, value.shape
        return value.expand(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        with torch.autocast(gradient.device.type, enabled=False):
            ctx.read(gradient)
        return gradient.sum_to_size(ctx.shape), None, None


class _FusedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, in_out: bool, read: Callable[..., Tensor | None]
    ) -> Tensor:
        kind = rows.device.type
        # Autocast leaves float64 alone.
        cast = torch.is_autocast_enabled(kind) and torch.float64 not in (rows.dtype, weight.dtype)
        dtype = torch.get_autocast_dtype(kind) if cast else rows.dtype
        with torch.autocast(kind, enabled=False):
            cast_rows, cast_weight = rows.to(dtype), weight.to(dtype)
            flat = cast_rows.reshape(-1, rows.shape[-1])
            right = cast_weight if in_out else cast_weight.t()
            # The output owns its memory; later in-place operations would refuse a view.
            output = flat.new_empty(rows.shape[:-1] + right.shape[1:])
            if bias is None:
                torch.mm(flat, right, out=output.view(-1, right.shape[1]))
            else:
                torch.addmm(bias.to(dtype), flat, right, out=output.view(-1, right.shape[1]))
        ctx.save_for_backward(cast_rows, cast_weight)
        ctx.read, ctx.in_out, ctx.rows_dtype = read, in_out, rows.dtype
        ctx.weight = weight.shape, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grad_rows = None
        with torch.autocast(gradient.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_rows = (gradient @ (weight.t() if ctx.in_out else weight)).to(ctx.rows_dtype)
            shape, dtype = ctx.weight
            total = torch.zeros(shape, dtype=dtype, device=gradient.device)
            grad_bias = ctx.read(gradient, rows, total)
            if ctx.needs_input_grad[2]:
                if grad_bias is None:
                    grad_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
                grad_bias = grad_bias.to(ctx.bias_dtype)
        return grad_rows, total, grad_bias, None, None
