"""How far a projected influence is from the exact one: the formulas against many draws, and the error bar it earns."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from tikmix_fast import ops
from tikmix_fast.ops.common.projection import ProjectionKind

KINDS = get_args(ProjectionKind)
HEIGHT, WIDTH, DIM = 40, 36, 16  # blocks of 16, 16 and 8 columns


def gradients(rank: int | None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two gradients of unit norm whose inner product is 0.28 or so; of a rank, they share their subspace."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if rank is None:
        first = random(HEIGHT, WIDTH)
        second = random(HEIGHT, WIDTH) + 0.3 * first
    else:
        left, right = random(HEIGHT, rank), random(rank, WIDTH)
        first, second = left @ right, left @ (random(rank, rank) @ right) + 0.3 * left @ right
    return first / first.norm(), second / second.norm()


def gram_moments(kind: str, dim: int, columns: int) -> Tensor:
    """``E[A_ab A_cd]`` of ``A = P^T P`` [columns, columns, columns, columns], by which entries of P are independent."""
    eye = torch.eye(columns, dtype=torch.float64)
    spread = torch.full((columns, columns), 1 / dim, dtype=torch.float64)
    if kind == "countsketch":  # columns of a block never meet, others do with probability 1 / dim
        block = torch.arange(columns) // dim
        spread[block[:, None] == block] = 0
    elif kind == "rademacher":  # the norm of a column is exact
        spread.fill_diagonal_(0)
    else:
        kurtosis = 2.99905
        spread.fill_diagonal_((kurtosis - 1) / 2 / dim)
    crossed = torch.einsum("ab,ac,bd->abcd", spread, eye, eye) + torch.einsum("ab,ad,bc->abcd", spread, eye, eye)
    return torch.einsum("ab,cd->abcd", eye, eye) + crossed


def exact_variance(kind: str, w: Tensor, g: Tensor, dim: int = DIM) -> float:
    """Variance of ``<P_o W P_i^T, P_o G P_i^T> = sum of G_ai A_ab W_bj B_ji``, A and B independent."""
    pairs = torch.einsum("ai,bj->abij", g, w).flatten(0, 1).flatten(1)  # [O * O, I * I]
    of_rows = gram_moments(kind, dim, w.shape[0]).flatten(0, 1).flatten(1)
    of_columns = gram_moments(kind, dim, w.shape[1]).flatten(0, 1).flatten(1)
    second = ((pairs.T @ of_rows @ pairs) * of_columns).sum()
    return float(second - (w * g).sum().square())


def gaussian_variance(w: Tensor, g: Tensor, k_out: int, k_in: int) -> float:
    """The closed formula, from a derivation of its own."""
    s, n = (w * g).sum(), w.square().sum() * g.square().sum()
    p, q = (w.T @ g).square().sum(), (g @ w.T).square().sum()
    gw = g @ w.T
    t = (gw @ gw).trace()
    return float((p * (1 + 1 / k_out) + n / k_out + t + (q + s.square()) / k_out) / k_in + (q + t) / k_out)


def draws(kind: str, w: Tensor, g: Tensor, count: int, dim: int) -> Tensor:
    """W and G under many projections [count, 2, dim, dim]."""
    both = torch.stack([w, g])
    seeds = range(count)
    return torch.stack(
        [ops.LayerProjection(*w.shape, k_out=dim, k_in=dim, kind=kind, seed=seed).project(both) for seed in seeds]
    )


@pytest.mark.parametrize("rank", [None, 2], ids=["full-rank", "rank-2"])
def test_the_moments_give_the_closed_formula_for_gaussian_matrices(rank: int | None) -> None:
    w, g = gradients(rank)
    # The drawn entries have kurtosis 2.999 and not 3: a two-thousandth of one term.
    assert exact_variance("gaussian", w, g) == pytest.approx(gaussian_variance(w, g, DIM, DIM), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [None, 2], ids=["full-rank", "rank-2"])
def test_draws_are_unbiased_and_have_the_exact_variance(kind: str, rank: int | None) -> None:
    w, g = gradients(rank)
    count = 2000
    exact, variance = float((w * g).sum()), exact_variance(kind, w, g)
    estimates = draws(kind, w, g, count, DIM).prod(1).sum((1, 2))
    assert abs(float(estimates.mean()) - exact) < 4 * (variance / count) ** 0.5
    squares = (estimates - exact).square()
    assert abs(float(squares.mean()) - variance) < 4 * float(squares.std()) / count**0.5
    assert float(squares.std()) / count**0.5 < 0.1 * variance  # or the line above says little


def test_a_countsketch_is_the_most_exact_and_a_gaussian_the_least() -> None:
    for rank in (None, 2):
        w, g = gradients(rank)
        sketch, rademacher, gaussian = (exact_variance(kind, w, g) for kind in KINDS)
        assert sketch < rademacher < gaussian


def test_more_rows_lower_the_variance_as_one_over_k() -> None:
    w, g = gradients(2)
    ratio = exact_variance("rademacher", w, g, 64) / exact_variance("rademacher", w, g, 16)
    assert 0.2 < ratio < 0.25  # a quarter, and less where 1 / k^2 still counts


# Rows of a dense matrix are independent, and the error bar is right in expectation. Rows of a countsketch are not: the
# fewer its blocks, here 2.5, the more it is overstated.
@pytest.mark.parametrize(
    ("kind", "dim", "most"), [("gaussian", 32, 1.1), ("rademacher", 32, 1.1), ("countsketch", 16, 2.0)]
)
@pytest.mark.parametrize("rank", [None, 2], ids=["full-rank", "rank-2"])
def test_the_error_bar_covers(kind: str, dim: int, most: float, rank: int | None) -> None:
    w, g = gradients(rank, seed=1)
    exact, variance = float((w * g).sum()), exact_variance(kind, w, g, dim)
    small = draws(kind, w, g, 1000, dim)
    estimates = small.prod(1).sum((1, 2))
    squared_errors = torch.cat([ops.projection_stderr(pair[:1], pair[1:]) for pair in small]).flatten().square()
    assert 0.9 < float(squared_errors.mean()) / variance < most
    coverage = float(((estimates - exact).square() <= 1.96**2 * squared_errors).double().mean())
    assert 0.88 < coverage < 0.995


def test_the_error_bar_is_that_of_the_textbook_analysis_of_variance() -> None:
    """Cell by cell, from the table of all products."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(3, 20, 30, generator=generator, dtype=torch.float64)
    queries = torch.randn(2, 20, 30, generator=generator, dtype=torch.float64) + small[:2]
    errors = ops.projection_stderr(small.float(), queries.float())
    assert errors.shape == (2, 3)
    assert errors.dtype == torch.float64
    for i in range(2):
        for j in range(3):
            z = 600 * queries[i].float().double() * small[j].float().double()
            rows, columns = z.mean(1), z.mean(0)
            rest = z - rows[:, None] - columns + z.mean()
            noise = rest.square().sum() / (19 * 29)
            of_rows = (rows.var() - noise / 30).clamp(min=0)
            of_columns = (columns.var() - noise / 20).clamp(min=0)
            expected = (of_rows / 20 + of_columns / 30 + noise / 600).sqrt()
            assert float(errors[i, j]) == pytest.approx(float(expected), rel=1e-10)


def test_a_larger_gradient_has_a_larger_error_bar() -> None:
    small, queries = torch.randn(4, 32, 32), torch.randn(3, 32, 32)
    errors = ops.projection_stderr(small, queries)
    torch.testing.assert_close(ops.projection_stderr(10 * small, queries), 10 * errors)
    torch.testing.assert_close(ops.projection_stderr(small.mT, queries.mT), errors)
    torch.testing.assert_close(ops.projection_stderr(queries, small), errors.T)


def test_empty_and_bad_arguments_of_the_error_bar() -> None:
    assert ops.projection_stderr(torch.zeros(0, 4, 4), torch.zeros(2, 4, 4)).shape == (2, 0)
    for shapes in (((3, 4, 5), (2, 4, 4)), ((3, 4), (2, 4, 4)), ((3, 4, 4), (4, 4))):
        with pytest.raises(ValueError, match=r"gradients and queries must have shapes \(m, k_out, k_in\)"):
            ops.projection_stderr(*(torch.zeros(shape) for shape in shapes))
    with pytest.raises(ValueError, match="k_out and k_in must be at least 2 to estimate an error; got 1 and 4"):
        ops.projection_stderr(torch.zeros(3, 1, 4), torch.zeros(2, 1, 4))
