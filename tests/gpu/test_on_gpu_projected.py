"""The numbers of projected_group_influence on a GPU against float64."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from tikmix_fast import ops, testing
from tikmix_fast.ops.common.projection import ProjectionKind

pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic")

KINDS = get_args(ProjectionKind)
SHAPES = [  # O, I, k_out, k_in, sizes, tasks
    pytest.param(8, 16, 16, 16, [1], 1, id="one-row"),
    pytest.param(40, 104, 16, 64, [9, 0, 28], 2, id="small"),
    pytest.param(136, 72, 64, 32, [50, 0, 77, 73], 5, id="several-tiles"),
    pytest.param(264, 136, 32, 128, [127, 129], 4, id="around-a-block"),
    pytest.param(768, 768, 64, 64, [700, 11, 1313, 24, 0, 300], 9, id="a-layer"),
    pytest.param(520, 1032, 128, 64, [10] * 64, 20, id="64-domains"),
    pytest.param(130, 70, 64, 32, [50, 0, 77, 73], 5, id="odd"),
]


def check(values: Tensor, call: tuple[Tensor, ...], projection: ops.LayerProjection) -> None:
    """Check the values against the budget of torch's products in the rows' dtype (float32 for sketches, float16)."""
    input, grad_output, offsets, queries = call
    offsets = offsets.cpu()
    wide_output, wide_input = projection.matrices(torch.float64)
    gradients = wide_output @ testing.domain_gradients(input, grad_output, offsets) @ wide_input.T
    expected = queries.double().flatten(1) @ gradients.flatten(1).T
    sketched = projection.kind == "countsketch" or input.dtype == torch.float16
    dtype = torch.float32 if sketched else input.dtype
    output_matrix, input_matrix = projection.matrices(dtype)
    eager, _ = testing.eager_group_influence(
        input.to(dtype) @ input_matrix.T, grad_output.to(dtype) @ output_matrix.T, offsets, queries.to(dtype)
    )
    # Kernels round projected rows to no less than 16 bits. A sketch may lose what torch loses by that rounding.
    rounded = dtype if input.dtype == torch.float32 else input.dtype
    small = [
        rows.to(rounded).to(dtype)
        for rows in (input.to(dtype) @ input_matrix.T, grad_output.to(dtype) @ output_matrix.T)
    ]
    coarse, _ = testing.eager_group_influence(*small, offsets, queries.to(dtype))
    eager_error = max(
        (testing.influence_error(each, expected, queries, gradients) for each in (eager, coarse)),
        key=lambda worst: worst.error,
    )
    testing.check_budget(
        testing.influence_error(values, expected, queries, gradients),
        eager_error,
        testing.rounding_floor(queries[0].numel()),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width", "k_out", "k_in", "sizes", "tasks"), SHAPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_values(
    make_call, backend: str, device: torch.device, dtype: torch.dtype, kind: str, height: int, width: int, k_out: int,
    k_in: int, sizes: list[int], tasks: int,
) -> None:  # fmt: skip
    call = make_call(height, width, sizes, tasks, dtype)
    projection = ops.LayerProjection(height, width, k_out=k_out, k_in=k_in, kind=kind, layer="l", device=str(device))
    queries = projection.project(call.queries)
    try:
        values = ops.projected_group_influence(*call.arguments[:3], queries, projection, backend=backend)
    except RuntimeError as error:
        if "asked for by backend cannot run this call" not in str(error) or (height % 8 == width % 8 == 0):
            raise
        pytest.skip(f"{backend} refuses this layout, with a reason")
    assert values.dtype == torch.float64
    assert values.shape == (tasks, len(sizes))
    assert (values.cpu()[:, torch.tensor(sizes) == 0] == 0).all()
    check(values, (*call.arguments[:3], queries), projection)
    again = ops.projected_group_influence(*call.arguments[:3], queries, projection, backend=backend)
    assert torch.equal(values, again)


@pytest.mark.parametrize("kind", KINDS)
def test_order_equals_a_sorted_copy(make_call, backend: str, device: torch.device, kind: str) -> None:
    call = make_call(136, 264, [50, 0, 77, 130], 3)
    projection = ops.LayerProjection(136, 264, k_out=64, k_in=32, kind=kind, device=str(device))
    queries = projection.project(call.queries)
    order = torch.randperm(len(call.input), generator=torch.Generator().manual_seed(1)).to(device)
    input, grad_output = torch.empty_like(call.input), torch.empty_like(call.grad_output)
    input[order], grad_output[order] = call.input, call.grad_output
    values = ops.projected_group_influence(
        input, grad_output, call.offsets, queries, projection, order=order, backend=backend
    )
    check(values, (*call.arguments[:3], queries), projection)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stays_in_its_domain(make_call, backend: str, device: torch.device, kind: str) -> None:
    call = make_call(40, 104, [12, 1, 24], 2)
    projection = ops.LayerProjection(40, 104, k_out=16, k_in=32, kind=kind, device=str(device))
    call.input[12, 3] = float("nan")
    queries = projection.project(call.queries)
    values = ops.projected_group_influence(*call.arguments[:3], queries, projection, backend=backend)
    assert values[:, 1].isnan().all()
    assert values[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("empty", ["rows", "domains", "tasks"])
def test_nothing_sums_to_zero(device: torch.device, backend: str, empty: str) -> None:
    rows, offsets, tasks = {"rows": (0, [0, 0, 0], 2), "domains": (0, [0], 2), "tasks": (5, [0, 5], 0)}[empty]
    projection = ops.LayerProjection(8, 16, k_out=16, k_in=32, device=str(device))
    input, grad_output = (torch.ones(rows, size, dtype=torch.bfloat16, device=device) for size in (16, 8))
    queries = torch.ones(tasks, 16, 32, device=device)
    values = ops.projected_group_influence(
        input, grad_output, torch.tensor(offsets, device=device), queries, projection, backend=backend
    )
    assert values.shape == (tasks, len(offsets) - 1)
    assert (values == 0).all()
