"""What is right for one layer, by float64, and the check of every method's answer against it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tikmix_fast import testing
from tikmix_fast.benchmarking.baselines import Answer, Layer, Method

__all__ = ["Errors", "LayerTruth", "check_answer"]

_WRONG = 30.0
"""A baseline has no budget to keep; it counts as broken beyond this many times the error of the eager path."""

# The float64 gradients of all domains exist for this many rows of the weights at a time.
_SLICE = 1024


class LayerTruth(NamedTuple):
    """What is right for a layer, and how wrong the eager torch path of the same dtype is.

    Attributes
    ----------
    values, total : float64 Tensor [n, m], [O, I]
    query_norms, gradient_norms : float64 Tensor [n, 1, 1], [m, 1, 1]
    eager, eager_total : testing.WorstCell
    weights : int
        Entries of a gradient.
    """

    values: Tensor
    total: Tensor
    query_norms: Tensor
    gradient_norms: Tensor
    eager: testing.WorstCell
    eager_total: testing.WorstCell
    weights: int

    @classmethod
    def of(cls, layer: Layer) -> LayerTruth:
        """Compute it one slice of the weights at a time, which avoids a float64 [m, O, I]."""
        tasks, height, width = layer.queries.shape
        domains = len(layer.offsets) - 1
        values = torch.zeros(tasks, domains, dtype=torch.float64, device=layer.input.device)
        total = torch.empty(height, width, dtype=torch.float64, device=layer.input.device)
        squares, query_squares = values.new_zeros(domains), values.new_zeros(tasks)
        for top in range(0, height, _SLICE):
            rows = slice(top, top + _SLICE)
            gradients = testing.domain_gradients(layer.input, layer.grad_output[:, rows], layer.offsets).flatten(1)
            queries = layer.queries[:, rows].double().flatten(1)
            values += queries @ gradients.T
            squares += gradients.square().sum(1)
            query_squares += queries.square().sum(1)
            total[rows] = gradients.sum(0).view(-1, width)
            del gradients, queries
        query_norms, gradient_norms = (each.sqrt()[:, None, None] for each in (query_squares, squares))
        eager, eager_total = testing.eager_group_influence(layer.input, layer.grad_output, layer.offsets, layer.queries)
        return cls(
            values,
            total,
            query_norms,
            gradient_norms,
            testing.influence_error(eager, values, query_norms, gradient_norms),
            testing.gradient_error(eager_total, total),
            height * width,
        )

    def projected(self, layer: Layer, matrices: tuple[Tensor, Tensor]) -> LayerTruth:
        """Return what is right for the same layer seen through matrices [k, O] and [k, I]; the total stays."""
        output, input = matrices
        wide = Layer(
            layer.input.double() @ input.double().T,
            layer.grad_output.double() @ output.double().T,
            layer.offsets,
            output.double() @ layer.queries.double() @ input.double().T,
        )
        dtype = layer.input.dtype
        small_input, small_grad = layer.input @ input.to(dtype).T, layer.grad_output @ output.to(dtype).T
        truth = LayerTruth.of(wide)
        values, _ = testing.eager_group_influence(small_input, small_grad, layer.offsets, wide.queries.to(dtype))
        eager = testing.influence_error(values, truth.values, truth.query_norms, truth.gradient_norms)
        return truth._replace(eager=eager, total=self.total, eager_total=self.eager_total)


class Errors(NamedTuple):
    """How far a right answer is from float64.

    Attributes
    ----------
    error : float or None
        Error of the influence: max over cells of ``|dS_ij| / (|q_i| |g_j|)``. Projected influence is compared with the
        same projections in float64. None if the method gives no influence.
    total_error : float or None
        Error of the total weight gradient, in the measure of `gradient_error`; None if the method gives no total.
    sampling_error : float or None
        Distance of projected influence from the exact one: root mean square over cells, in the unit of ``error``.
    """

    error: float | None
    total_error: float | None
    sampling_error: float | None

    @property
    def gives(self) -> list[str]:
        """What the method gives: "influence", "total" or both."""
        parts = {"influence": self.error, "total": self.total_error}
        return [name for name, error in parts.items() if error is not None]


def check_answer(answer: Answer, method: Method, layer: Layer, truth: LayerTruth) -> Errors:
    """Compare an answer with float64.

    Raises
    ------
    AssertionError
        If it is wrong. Our methods have the budget of `tikmix_fast.testing`, twice the error of the eager torch path in
        the same dtype; the others may have 30 times that error.
    """
    error = total_error = sampling_error = None
    if answer.values is not None:
        right = truth
        if method.matrices is not None:
            right = truth.projected(layer, method.matrices(layer))
            scale = truth.query_norms[:, 0] * truth.gradient_norms[:, 0, 0]
            sampling_error = float(((answer.values.double() - truth.values) / scale).square().mean().sqrt())
        worst = testing.influence_error(answer.values, right.values, right.query_norms, right.gradient_norms)
        error = _accept("influence", method.ours, worst, right.eager, testing.rounding_floor(right.weights))
    if answer.total is not None:
        worst = testing.gradient_error(answer.total, truth.total)
        total_error = _accept("total", method.ours, worst, truth.eager_total, 1e-6)
    return Errors(error, total_error, sampling_error)


def _accept(part: str, ours: bool, worst: testing.WorstCell, eager: testing.WorstCell, floor: float) -> float:
    if not math.isfinite(worst.error):
        raise AssertionError(f"{part}: {worst}")
    if ours:
        try:
            testing.check_budget(worst, eager, floor)
        except AssertionError as error:
            raise AssertionError(f"{part}: {error}") from None
    elif not worst.error <= _WRONG * eager.error + floor:
        raise AssertionError(f"{part}: {worst}, where the eager path has {eager}")
    return worst.error
