"""What the tests of several backends share: the check of a whole call, and calls that every backend must survive."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tikmix_fast import testing
from tikmix_fast.ops.common.device_checks import WRONG_OFFSETS, WRONG_ORDER

__all__ = ["NOTHING", "WRONG_ROWS", "check_group_influence", "linear"]

NOTHING = [
    pytest.param(0, 3, 4, [0, 0, 0], 2, id="no-rows"),
    pytest.param(0, 3, 4, [0], 2, id="no-domains"),
    pytest.param(5, 3, 4, [0, 5], 0, id="no-tasks"),
    pytest.param(5, 0, 4, [0, 2, 5], 2, id="no-outputs"),
    pytest.param(5, 3, 0, [0, 2, 5], 2, id="no-inputs"),
]
"""T, O, I, offsets and n of calls with nothing to sum."""

WRONG_ROWS = [
    pytest.param([1, 20, 40], None, WRONG_OFFSETS, id="begins-late"),
    pytest.param([0, 20, 39], None, WRONG_OFFSETS, id="ends-early"),
    pytest.param([0, 20, 41], None, WRONG_OFFSETS, id="ends-late"),
    pytest.param([0, 30, 20, 40], None, WRONG_OFFSETS, id="decreases"),
    pytest.param([0, -(2**40), 40], None, WRONG_OFFSETS, id="negative"),
    pytest.param([0, 2**40, 40], None, WRONG_OFFSETS, id="far"),
    pytest.param([0, 20, 40], -1, WRONG_ORDER, id="negative-row"),
    pytest.param([0, 20, 40], 40, WRONG_ORDER, id="row-after-the-last"),
    pytest.param([0, 20, 40], 2**50, WRONG_ORDER, id="far-row"),
    pytest.param([0, 5], -1, WRONG_OFFSETS | WRONG_ORDER, id="both"),
]
"""Offsets of 40 rows, an entry to write into their order, and what is wrong with the two."""


def check_group_influence(
    input: Tensor,
    grad_output: Tensor,
    offsets: Tensor,
    queries: Tensor,
    order: Tensor | None = None,
    *,
    values: Tensor,
    grad_weight: Tensor | None = None,
    before: Tensor | None = None,
) -> None:
    """Raise unless the values of a call of ``group_influence``, and its sum, are within the budget.

    Parameters
    ----------
    input, grad_output, offsets, queries, order
        The arguments of the call.
    values : Tensor [n, m]
        Its result.
    grad_weight, before : Tensor [O, I], optional
        The total weight gradient after the call and before it.

    Examples
    --------
    >>> import torch
    >>> ones = torch.ones(3, 1)
    >>> call = (ones, ones, torch.tensor([0, 1, 3]), torch.ones(1, 1, 1))
    >>> check_group_influence(*call, values=torch.tensor([[1.0, 2.0]]))
    """
    gradients = testing.domain_gradients(input, grad_output, offsets, order)
    right = torch.einsum("noi,moi->nm", queries.double(), gradients)
    eager, eager_total = testing.eager_group_influence(input, grad_output, offsets, queries, order)
    floor = testing.rounding_floor(queries.shape[1] * queries.shape[2])
    errors = (testing.influence_error(each, right, queries, gradients) for each in (values, eager))
    testing.check_budget(*errors, floor)
    if grad_weight is not None and before is not None:
        total = before.double() + gradients.sum(0)
        sums = (grad_weight, before + eager_total.to(before.dtype))
        testing.check_budget(*(testing.gradient_error(each, total) for each in sums), floor)


def linear(input: Tensor, weight: Tensor, in_backward: Callable[[Tensor, Tensor], object]) -> Tensor:
    """Return ``input @ weight.T``; its backward has ``in_backward(grad_output, grad_weight)`` write the gradient."""

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(weight)
            return input @ weight.T

        @staticmethod
        def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor]:
            (weight,) = ctx.saved_tensors
            grad_weight = torch.zeros_like(weight)
            in_backward(grad_output, grad_weight)
            return grad_output @ weight, grad_weight

    return Linear.apply(input, weight)
