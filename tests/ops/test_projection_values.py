"""Values of projected_group_influence against the two matrix products and an inner product, in float64."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from tikmix_fast import ops, testing
from tikmix_fast.ops.common.projection import ProjectionKind

KINDS = get_args(ProjectionKind)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = ["f32", "bf16", "f16"]
SHAPES = [  # T, O, I, k_out, k_in, domains, tasks
    (9, 1, 1, 16, 16, 4, 5),
    (37, 20, 100, 16, 64, 3, 2),
    (200, 130, 70, 64, 32, 5, 3),
    (64, 257, 129, 32, 128, 2, 4),
]


def case(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, ops.LayerProjection], Tensor, Tensor]:
    """The arguments of a call, its value in float64, and the domains' projected gradients in float64."""
    rows, height, width, k_out, k_in, domains, tasks = shape
    generator = torch.Generator().manual_seed(sum(shape))
    input, grad_output = (torch.randn(rows, size, generator=generator).to(dtype) for size in (width, height))
    cuts = torch.randint(0, rows + 1, (domains - 1,), generator=generator).sort().values
    offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([rows])])
    projection = ops.LayerProjection(height, width, k_out=k_out, k_in=k_in, kind=kind, layer="a layer")
    queries = projection.project(torch.randn(tasks, height, width, generator=generator))
    output_matrix, input_matrix = projection.matrices(torch.float64)
    gradients = output_matrix @ testing.domain_gradients(input, grad_output, offsets) @ input_matrix.T
    expected = queries.double().flatten(1) @ gradients.flatten(1).T
    return (input, grad_output, offsets, queries, projection), expected, gradients


def check(values: Tensor, call: tuple[Tensor, ...], expected: Tensor, gradients: Tensor) -> None:
    """Within the budget of torch's own products: in float32 for a countsketch, in the inputs' dtype for the others."""
    input, grad_output, offsets, queries, projection = call
    dtype = torch.float32 if projection.kind == "countsketch" or input.dtype == torch.float16 else input.dtype
    output_matrix, input_matrix = projection.matrices()
    eager, _ = testing.eager_group_influence(
        input.to(dtype) @ input_matrix.T.to(dtype),
        grad_output.to(dtype) @ output_matrix.T.to(dtype),
        offsets,
        queries.to(dtype),
    )
    kernel_error = testing.influence_error(values, expected, queries, gradients)
    eager_error = testing.influence_error(eager, expected, queries, gradients)
    testing.check_budget(kernel_error, eager_error, testing.rounding_floor(queries[0].numel()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.usefixtures("poisoned_memory")
def test_values(backend: str, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    call, expected, gradients = case(shape, dtype, kind)
    values = ops.projected_group_influence(*call, backend=backend)
    assert values.dtype == torch.float64
    check(values, call, expected, gradients)
    if backend == "reference":
        torch.testing.assert_close(values, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_forced_instruction_sets(instruction_set: str, dtype: torch.dtype, kind: str) -> None:
    call, expected, gradients = case(SHAPES[2], dtype, kind)
    check(ops.projected_group_influence(*call, backend="cpu"), call, expected, gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_through_an_order_and_of_any_strides(backend: str, kind: str) -> None:
    (input, grad_output, offsets, queries, projection), _, _ = case(SHAPES[2], torch.float32, kind)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    expected = ops.projected_group_influence(
        input[order], grad_output[order], offsets, queries, projection, backend="reference"
    )
    for x, dy in ((input, grad_output), (input.T.contiguous().T, torch.cat([grad_output] * 2, 1)[:, 130:])):
        values = ops.projected_group_influence(x, dy, offsets, queries, projection, order=order, backend=backend)
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["f32", "bf16", "f64"])
def test_a_pair_of_matrices_is_a_projection(backend: str, dtype: torch.dtype) -> None:
    if (backend, dtype) == ("triton", torch.float64):
        pytest.skip("the Triton kernels refuse matrices of float64; the reference takes them")
    (input, grad_output, offsets, queries, projection), expected, _ = case(SHAPES[2], torch.float32, "gaussian")
    pair = projection.matrices(dtype)
    values = ops.projected_group_influence(input, grad_output, offsets, queries, pair, backend=backend)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4  # the matrices themselves are rounded
    torch.testing.assert_close(values, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_float64_is_taken_by_the_reference(backend: str) -> None:
    call, expected, _ = case(SHAPES[1], torch.float64, "countsketch")
    torch.testing.assert_close(ops.projected_group_influence(*call), expected, rtol=1e-11, atol=1e-11)
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=r"input is torch\.float64, none of float32"):
            ops.projected_group_influence(*call, backend=backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "height", "width", "tasks"), [(0, 5, 6, 2), (4, 0, 6, 2), (4, 5, 0, 2), (4, 5, 6, 0)])
@pytest.mark.usefixtures("poisoned_memory")
def test_empty(backend: str, rows: int, height: int, width: int, tasks: int, kind: str) -> None:
    projection = ops.LayerProjection(height, width, k_out=32, k_in=16, kind=kind)
    offsets = torch.tensor([0, 0, rows])
    queries = torch.ones(tasks, 32, 16)
    input, grad_output = torch.ones(rows, width), torch.ones(rows, height)
    values = ops.projected_group_influence(input, grad_output, offsets, queries, projection, backend=backend)
    assert values.shape == (tasks, 2)
    assert (values[:, 0] == 0).all()
    if rows * height * width == 0:
        assert (values == 0).all()
    gradients = ops.projected_domain_gradients(input, grad_output, offsets, projection)
    assert gradients.shape == (2, 32, 16)
    assert (gradients[0] == 0).all()
    no_domains = torch.tensor([0])
    if rows == 0:
        assert ops.projected_group_influence(input, grad_output, no_domains, queries, projection).shape == (tasks, 0)
        assert ops.projected_domain_gradients(input, grad_output, no_domains, projection).shape == (0, 32, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stays_in_its_domain(backend: str, kind: str) -> None:
    (input, grad_output, _, queries, projection), _, _ = case(SHAPES[1], torch.float32, kind)
    input[12, 3] = float("nan")
    offsets = torch.tensor([0, 12, 13, 37])
    values = ops.projected_group_influence(input, grad_output, offsets, queries, projection, backend=backend)
    assert torch.equal(values.isnan().any(0), torch.tensor([False, True, False]))
    assert values[:, 1].isnan().all()


def test_a_sketch_with_room_for_every_column_is_exact(backend: str) -> None:
    """Columns of a block never meet: with k at least O and I nothing is lost."""
    input, grad_output, queries = torch.randn(50, 30), torch.randn(50, 64), torch.randn(3, 64, 30)
    offsets = torch.tensor([0, 20, 50])
    projection = ops.LayerProjection(64, 30, k_out=64, k_in=32, seed=5)
    values = ops.projected_group_influence(
        input, grad_output, offsets, projection.project(queries), projection, backend=backend
    )
    torch.testing.assert_close(
        values, ops.group_influence(input, grad_output, offsets, queries, backend="reference"), rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("ordered", [False, True], ids=["in-order", "order"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_domain_gradients_are_those_of_the_values(dtype: torch.dtype, kind: str, ordered: bool, backend: str) -> None:
    (input, grad_output, offsets, queries, projection), expected, gradients = case(SHAPES[2], dtype, kind)
    order = None
    if ordered:
        order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
        input, grad_output = (rows[torch.argsort(order)] for rows in (input, grad_output))
    with ops.use_backend(backend):
        computed = ops.projected_domain_gradients(input, grad_output, offsets, projection, order=order)
    assert computed.dtype == torch.float32
    rounded = backend == "cpu" and dtype == torch.bfloat16 and kind != "countsketch"
    for value, reference in zip(computed, gradients, strict=True):
        assert testing.gradient_error(value, reference).error < (3e-2 if rounded else 1e-5)
    values = queries.double().flatten(1) @ computed.double().flatten(1).T
    torch.testing.assert_close(values, expected, rtol=0, atol=(1e-2 if rounded else 1e-5) * float(expected.abs().max()))


def test_domain_gradients_of_a_pair_and_of_float64() -> None:
    (input, grad_output, offsets, _, projection), _, gradients = case(SHAPES[2], torch.float64, "countsketch")
    computed = ops.projected_domain_gradients(input, grad_output, offsets, projection)
    torch.testing.assert_close(computed.double(), gradients, rtol=1e-4, atol=1e-4)
    computed = ops.projected_domain_gradients(input, grad_output, offsets, projection.matrices(torch.float64))
    torch.testing.assert_close(computed.double(), gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind: str) -> None:
    (input, grad_output, offsets, queries, projection), _, _ = case(SHAPES[2], torch.float32, kind)
    whole = torch.randn(3, 130, 70)

    def everything() -> tuple[Tensor, ...]:
        return (
            ops.projected_group_influence(input, grad_output, offsets, queries, projection),
            ops.projected_domain_gradients(input, grad_output, offsets, projection),
            projection.project(whole),
        )

    expected = everything()
    with torch.autocast("cpu", torch.bfloat16):
        found = everything()
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_projections_that_are_none_are_refused() -> None:
    (input, grad_output, offsets, queries, projection), _, _ = case(SHAPES[1], torch.float32, "rademacher")
    for wrong in (projection.matrices()[0], (*projection.matrices(), 1.0)):
        with pytest.raises(TypeError, match="projection must be a LayerProjection or a pair of tensors; got"):
            ops.projected_group_influence(input, grad_output, offsets, queries, wrong)
    with pytest.raises(TypeError, match=r"k_out must be an int; got 32\.0"):
        ops.LayerProjection(5, 5, k_out=32.0)
    with pytest.raises(TypeError, match=r"layer must be an int or a name; got 1\.5"):
        ops.LayerProjection(5, 5, layer=1.5)
