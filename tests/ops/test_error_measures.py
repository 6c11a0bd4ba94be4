"""The measures that judge every backend, on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tikmix_fast import ops
from tikmix_fast.testing import (
    WorstCell,
    check_budget,
    domain_gradients,
    eager_group_influence,
    gradient_error,
    influence_error,
    rounding_floor,
)

QUERIES = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]])  # norms 5 and 1
GRADIENTS = torch.tensor([[[0.0, 2.0]], [[0.0, 0.0]]])  # norms 2 and 0
RIGHT = torch.tensor([[8.0, 0.0], [0.0, 0.0]])


def test_influence_error_is_relative_to_both_norms() -> None:
    worst = influence_error(RIGHT + torch.tensor([[1.0, 0.0], [0.4, 0.0]]), RIGHT, QUERIES, GRADIENTS)
    assert worst.error == pytest.approx(0.2)
    assert worst.index == (1, 0)
    assert "at (1, 0): 0.4" in str(worst)


def test_a_cell_of_a_zero_gradient_must_be_exact() -> None:
    assert influence_error(RIGHT, RIGHT, QUERIES, GRADIENTS).error == 0
    wrong = RIGHT + torch.tensor([[0.0, 1e-30], [0.0, 0.0]])
    assert influence_error(wrong, RIGHT, QUERIES, GRADIENTS).error == math.inf


def test_nan_is_an_infinite_error() -> None:
    wrong = RIGHT.clone()
    wrong[0, 0] = math.nan
    assert influence_error(wrong, RIGHT, QUERIES, GRADIENTS).error == math.inf
    with pytest.raises(AssertionError, match=r"nan instead of 8\.0"):
        check_budget(influence_error(wrong, RIGHT, QUERIES, GRADIENTS), WorstCell(1e-3, (0, 0), 1.0, 1.0), 0.0)


def test_gradient_error_is_relative_to_the_root_mean_square() -> None:
    worst = gradient_error(torch.tensor([[3.0, 4.5]]), torch.tensor([[3.0, 4.0]]))
    assert worst.error == pytest.approx(0.5 / math.sqrt(12.5))
    assert worst.index == (0, 1)


def test_the_budget_is_twice_the_eager_error_and_a_floor() -> None:
    eager = WorstCell(1e-6, (0, 0), 1.0, 1.0)
    check_budget(WorstCell(2.5e-6, (0, 0), 1.0, 1.0), eager, floor=0.6e-6)
    with pytest.raises(AssertionError, match=r"allowed 2\.400e-06"):
        check_budget(WorstCell(2.5e-6, (0, 0), 1.0, 1.0), eager, floor=0.4e-6)


def test_the_floor_shrinks_as_roundings_average_out() -> None:
    assert rounding_floor(1) == torch.finfo(torch.float32).eps
    assert rounding_floor(10_000) == rounding_floor(1) / 100


def test_the_exact_gradients_and_the_eager_path_agree_with_autograd() -> None:
    torch.manual_seed(0)
    input, weight, target = torch.randn(7, 3), torch.randn(2, 3), torch.randn(7, 2)
    offsets, order = torch.tensor([0, 3, 3, 7]), torch.randperm(7)
    per_domain = []
    for start, end in ((0, 3), (3, 3), (3, 7)):
        leaf = weight.double().requires_grad_()
        rows = order[start:end]
        (input[rows].double() @ leaf.T * target[rows].double()).sum().backward()
        per_domain.append(leaf.grad)
    gradients = domain_gradients(input, target, offsets, order)
    torch.testing.assert_close(gradients, torch.stack(per_domain))

    queries = torch.randn(4, 2, 3)
    values, total = eager_group_influence(input, target, offsets, queries, order)
    exact = ops.group_influence(input, target, offsets, queries, order=order, backend="reference")
    torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.double(), gradients.sum(0), rtol=1e-5, atol=1e-5)
