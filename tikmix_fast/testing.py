"""How errors of the kernels are measured, and how large they may be: one place for every backend's tests.

The budget is relative to the plain torch path of the same dtype, since no fixed tolerance fits both a layer of 8
weights and one of 16 million: ``error(kernel) <= BUDGET * error(eager) + floor(weights)``, both against float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "BUDGET",
    "WorstCell",
    "check_budget",
    "domain_gradients",
    "eager_group_influence",
    "gradient_error",
    "influence_error",
    "rounding_floor",
]

BUDGET = 2.0
"""How many times the error of the eager path a kernel may have."""


@dataclass(frozen=True)
class WorstCell:
    """The cell with the largest error.

    Attributes
    ----------
    error : float
        In the measure of the function that returned it; NaN counts as infinite.
    index : tuple of int
        Where it is.
    value, reference : float
        What was computed there, and what is right.
    """

    error: float
    index: tuple[int, ...]
    value: float
    reference: float

    def __str__(self) -> str:
        return f"error {self.error:.3e} at {self.index}: {self.value!r} instead of {self.reference!r}"


def domain_gradients(input: Tensor, grad_output: Tensor, offsets: Tensor, order: Tensor | None = None) -> Tensor:
    """Form every domain's weight gradient in float64, as one einsum per domain.

    Parameters
    ----------
    input, grad_output, offsets, order
        As in `tikmix_fast.ops.group_influence`.

    Returns
    -------
    float64 Tensor [m, O, I]

    Examples
    --------
    >>> import torch
    >>> domain_gradients(torch.ones(3, 1), torch.ones(3, 1), torch.tensor([0, 1, 3])).flatten().tolist()
    [1.0, 2.0]
    """
    if order is not None:
        input, grad_output = input[order], grad_output[order]
    input, grad_output = input.double(), grad_output.double()
    return torch.stack(
        [torch.einsum("to,ti->oi", grad_output[a:b], input[a:b]) for a, b in pairwise(offsets.tolist())]
        or [input.new_zeros(grad_output.shape[1], input.shape[1])]
    )[: offsets.numel() - 1]


def eager_group_influence(
    input: Tensor, grad_output: Tensor, offsets: Tensor, queries: Tensor, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute group influence as one would by hand, every product and sum in the dtype of the arguments.

    Returns
    -------
    values : Tensor [n, m]
    grad_weight : Tensor [O, I]
        ``grad_output.T @ input``, as autograd forms it.

    Examples
    --------
    >>> import torch
    >>> ones = torch.ones(3, 1)
    >>> eager_group_influence(ones, ones, torch.tensor([0, 1, 3]), torch.ones(1, 1, 1))[0]
    tensor([[1., 2.]])
    """
    if order is not None:
        input, grad_output = input[order], grad_output[order]
    flat = queries.flatten(1)
    columns = [flat @ (grad_output[a:b].T @ input[a:b]).flatten().to(flat.dtype) for a, b in pairwise(offsets.tolist())]
    return torch.stack(columns, 1), grad_output.T @ input


def influence_error(values: Tensor, reference: Tensor, queries: Tensor, gradients: Tensor) -> WorstCell:
    """Measure the error of an influence matrix: max over cells of ``|dS_ij| / (|q_i| |g_j|)``.

    Relative to the cell itself an error is ill-posed, because inner products of gradients cancel.

    Parameters
    ----------
    values, reference : Tensor [n, m]
        What was computed, and what is right.
    queries : Tensor [n, O, I]
    gradients : Tensor [m, O, I]
        The domains' gradients, from `domain_gradients`. A cell where either norm is 0 must be exact.

    Examples
    --------
    >>> import torch
    >>> unit = torch.ones(1, 1, 1)
    >>> print(influence_error(torch.tensor([[1.5]]), torch.tensor([[1.0]]), unit, unit))
    error 5.000e-01 at (0, 0): 1.5 instead of 1.0
    """
    scale = queries.double().flatten(1).norm(dim=1)[:, None] * gradients.double().flatten(1).norm(dim=1)
    return _worst(values, reference, scale)


def gradient_error(value: Tensor, reference: Tensor) -> WorstCell:
    """Measure the error of a weight gradient: the largest entry of the difference over the root mean square entry.

    Parameters
    ----------
    value, reference : Tensor [O, I]
        What was computed, and what is right.

    Examples
    --------
    >>> import torch
    >>> gradient_error(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]])).error
    2.0
    """
    return _worst(value, reference, reference.double().square().mean().sqrt().expand(reference.shape))


def _worst(values: Tensor, reference: Tensor, scale: Tensor) -> WorstCell:
    values, reference = values.double(), reference.double()
    difference = (values - reference).abs()
    errors = torch.where(difference == 0, 0.0, difference / scale).nan_to_num(math.inf, math.inf)
    if errors.numel() == 0:
        return WorstCell(0.0, (), math.nan, math.nan)
    index = tuple(int(i) for i in torch.unravel_index(errors.argmax(), errors.shape))
    return WorstCell(float(errors[index]), index, float(values[index]), float(reference[index]))


def rounding_floor(weights: int) -> float:
    """Return the error of an inner product over ``weights`` entries that were each rounded twice to float32.

    Roundings average out as the square root of their number. Below this, two errors are not worth comparing.

    Examples
    --------
    >>> rounding_floor(4) == torch.finfo(torch.float32).eps / 2
    True
    """
    return torch.finfo(torch.float32).eps / math.sqrt(max(weights, 1))


def check_budget(kernel: WorstCell, eager: WorstCell, floor: float) -> None:
    """Raise unless the kernel's error is within the budget.

    Parameters
    ----------
    kernel, eager : WorstCell
        Errors of the two, in one measure.
    floor : float
        What is always allowed; see `rounding_floor`.

    Raises
    ------
    AssertionError
        With the worst cell and the eager error.

    Examples
    --------
    >>> cell = WorstCell(1e-7, (0, 0), 1.0, 1.0)
    >>> check_budget(cell, cell, floor=0.0)
    """
    allowed = BUDGET * eager.error + floor
    if not kernel.error <= allowed:
        raise AssertionError(f"{kernel}; allowed {allowed:.3e}, {BUDGET:g} times the eager path's {eager}")
