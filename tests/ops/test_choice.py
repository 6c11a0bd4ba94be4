"""Which way group influence takes: by counting, and right either way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tikmix_fast import ops
from tikmix_fast.ops.backends.cpu.cost import count_costs
from tikmix_fast.ops.backends.cpu.exact import fused, row_wise
from tikmix_fast.ops.common.checks import Arguments
from tikmix_fast.testing import (
    WorstCell,
    check_budget,
    domain_gradients,
    eager_group_influence,
    influence_error,
    rounding_floor,
)


@pytest.mark.parametrize("pairs", [False, True], ids=["f32", "bf16"])
def test_long_domains_are_fused_and_single_rows_are_not(pairs: bool) -> None:
    for tasks in (1, 2):
        long = count_costs(4096, 1024, 1024, 8, tasks, with_total=True, pairs=pairs)
        single = count_costs(4096, 1024, 1024, 4096, tasks, with_total=False, pairs=pairs)
        assert long.cheapest() == "fused"
        assert single.row_wise < single.fused


@given(
    rows=st.integers(1, 10**6),
    domains=st.integers(1, 10**4),
    tasks=st.integers(1, 100),
    with_total=st.booleans(),
    pairs=st.booleans(),
)
def test_more_work_never_costs_less(rows: int, domains: int, tasks: int, with_total: bool, pairs: bool) -> None:
    def costs(rows: int, domains: int, tasks: int) -> tuple[float, ...]:
        return count_costs(rows, 64, 48, domains, tasks, with_total=with_total, pairs=pairs)

    here = costs(rows, domains, tasks)
    for more in (costs(rows + 1, domains, tasks), costs(rows, domains + 1, tasks), costs(rows, domains, tasks + 1)):
        assert all(after >= before for before, after in zip(here, more, strict=True))


@st.composite
def many_small_domains(draw: st.DrawFn) -> tuple[torch.Tensor, ...]:
    sizes = draw(st.lists(st.sampled_from([0, 1, 1, 1, 2]), min_size=1, max_size=60))
    rows, height, width, tasks = sum(sizes), draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    input, grad_output, queries = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, width), (rows, height), (tasks, height, width))
    )
    order = torch.randperm(rows, generator=generator)
    return input, grad_output, torch.tensor([0, *sizes]).cumsum(0), queries, order


def eager_error(call: tuple[torch.Tensor, ...], domains: int = 100) -> WorstCell:
    """Measure the eager path on the call and on random rows after it, in at least that many domains of its sizes.

    In a few cells the eager path's roundings may happen to cancel: their error alone does not tell its accuracy.
    """
    input, grad_output, offsets, queries, order = call
    sizes = offsets.diff()
    copies = -(-domains // max(int(sizes.count_nonzero()), 1))
    generator = torch.Generator().manual_seed(0)
    input, grad_output = (
        torch.cat([rows[order], torch.randn(copies * len(rows), rows.shape[1], generator=generator).to(rows.dtype)])
        for rows in (input, grad_output)
    )
    offsets = torch.cat([offsets[:1], sizes.repeat(1 + copies).cumsum(0)])
    gradients = domain_gradients(input, grad_output, offsets)
    right = torch.einsum("noi,moi->nm", queries.double(), gradients)
    values, _ = eager_group_influence(input, grad_output, offsets, queries)
    return influence_error(values, right, queries, gradients)


@settings(deadline=None)
@given(call=many_small_domains(), ordered=st.booleans(), with_total=st.booleans())
def test_both_ways_stay_within_the_error_budget(
    call: tuple[torch.Tensor, ...], ordered: bool, with_total: bool
) -> None:
    input, grad_output, offsets, queries, permutation = call
    order = permutation if ordered else None
    gradients = domain_gradients(input, grad_output, offsets, order)
    right = torch.einsum("noi,moi->nm", queries.double(), gradients)
    rows = permutation if ordered else torch.arange(len(input))
    eager = eager_error((input, grad_output, offsets, queries, rows))
    weights = queries.shape[1] * queries.shape[2]
    for way in ("fused", "row_wise"):
        total = torch.zeros(queries.shape[1:]) if with_total else None
        arguments = Arguments(input, grad_output, offsets, queries, None, order, total)
        values = fused(arguments) if way == "fused" else row_wise(arguments, offsets.tolist())
        # A cell of one row and few weights is rounded once or twice, where eager may happen not to round at all.
        floor = rounding_floor(weights) * (torch.finfo(input.dtype).eps / torch.finfo(torch.float32).eps)
        check_budget(influence_error(values, right, queries, gradients), eager, floor)
        if total is not None:
            torch.testing.assert_close(total.double(), gradients.sum(0), rtol=1e-5, atol=1e-5)


def test_a_row_that_is_not_finite_reaches_its_own_domain_only() -> None:
    input, grad_output = torch.randn(64, 20), torch.randn(64, 30)
    input[5, 3] = torch.nan
    values = ops.group_influence(input, grad_output, torch.arange(65), torch.randn(1, 30, 20), backend="cpu")
    assert count_costs(64, 30, 20, 64, 1, with_total=False, pairs=False).cheapest() == "row_wise"
    assert values.isnan().nonzero().tolist() == [[0, 5]]


def test_products_of_rows_and_queries_do_not_overflow_in_float16() -> None:
    input, grad_output = torch.full((4, 8), 300.0).half(), torch.full((4, 2), 1e-3).half()
    queries = torch.full((1, 2, 8), 300.0).half()
    values = ops.group_influence(input, grad_output, torch.arange(5), queries, backend="cpu")
    torch.testing.assert_close(
        values, torch.full((1, 4), 16 * 300 * 300 * float(grad_output[0, 0]), dtype=torch.float64)
    )
