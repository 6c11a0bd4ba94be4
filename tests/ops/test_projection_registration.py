"""projected_group_influence as torch sees it, and what it refuses."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from tikmix_fast import ops
from tikmix_fast.ops.common.projection import ProjectionKind

OP = torch.ops.tikmix_fast.projected_group_influence.default
KINDS = get_args(ProjectionKind)


def arguments(kind: str = "countsketch") -> tuple[Tensor, Tensor, Tensor, Tensor, ops.LayerProjection]:
    generator = torch.Generator().manual_seed(3)
    input, grad_output, queries = (
        torch.randn(*shape, generator=generator) for shape in ((20, 50), (20, 40), (3, 32, 16))
    )
    projection = ops.LayerProjection(40, 50, k_out=32, k_in=16, kind=kind)
    return input, grad_output, torch.tensor([0, 6, 6, 20]), queries, projection


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [None, torch.randperm(20)], ids=["in-order", "order"])
def test_opcheck(backend: str, kind: str, order: Tensor | None) -> None:
    *tensors, projection = arguments(kind)
    factors = (projection.output_factor, projection.input_factor, projection.scale)
    torch.library.opcheck(OP, (*tensors, *factors, order, backend))


def test_the_schema_is_the_contract() -> None:
    assert str(OP._schema) == (
        "tikmix_fast::projected_group_influence(Tensor input, Tensor grad_output, Tensor offsets, Tensor queries, "
        "Tensor output_factor, Tensor input_factor, float scale, Tensor? order, str? backend) -> Tensor"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(backend: str, compiler: str, kind: str) -> None:
    torch.compiler.reset()  # each backend and kind would otherwise count as one more recompilation of the same function

    @torch.compile(fullgraph=True, backend=compiler, dynamic=True)
    def influence(
        input: Tensor,
        grad_output: Tensor,
        offsets: Tensor,
        queries: Tensor,
        projection: ops.LayerProjection,
        order: Tensor,
    ) -> Tensor:
        values = ops.projected_group_influence(
            input * 2, grad_output, offsets, queries, projection, order=order, backend=backend
        )
        return values.sum(0)

    input, grad_output, _, queries, projection = arguments(kind)
    for rows in (20, 7, 13):
        order, offsets = torch.arange(rows).flip(0), torch.tensor([0, 3, rows])
        call = (input[:rows], grad_output[:rows], offsets, queries, projection)
        expected = 2 * ops.projected_group_influence(*call, order=order, backend=backend).sum(0)
        torch.testing.assert_close(influence(*call, order), expected, rtol=1e-5, atol=1e-4)


def test_a_derivative_is_refused_and_not_taken_silently(backend: str) -> None:
    for which, name in ((0, "input"), (1, "grad_output"), (3, "queries")):
        call = list(arguments())
        call[which].requires_grad_()
        with pytest.raises(RuntimeError, match=f"no derivative, but {name} requires grad.*no_grad"):
            ops.projected_group_influence(*call, backend=backend)
        with torch.no_grad():
            assert not ops.projected_group_influence(*call, backend=backend).requires_grad
    *call, projection = arguments()
    pair = projection.matrices()
    pair[1].requires_grad_()
    with pytest.raises(RuntimeError, match="no derivative, but projection to k_in requires grad"):
        ops.projected_group_influence(*call, pair, backend=backend)


def test_use_backend_and_a_backend_for_another_device() -> None:
    call = arguments()
    with ops.use_backend("reference"):
        values = ops.projected_group_influence(*call)
    assert torch.equal(values, ops.projected_group_influence(*call, backend="reference"))
    with pytest.raises(RuntimeError, match="the backend 'cuda' asked for by backend cannot run this call"):
        ops.projected_group_influence(*call, backend="cuda")


HANDLE = ops.LayerProjection(3, 4, k_out=16, k_in=32)
PAIR = (torch.ones(5, 3), torch.ones(6, 4))
BAD = [
    ({"input": torch.ones(6)}, ValueError, r"input must have shape \(T, I\); got \(6,\)"),
    ({"grad_output": torch.ones(5, 3)}, ValueError, r"grad_output must have shape \(6, O\); got \(5, 3\)"),
    ({"queries": torch.ones(16, 32)}, ValueError, r"queries must have shape \(n, k_out, k_in\)"),
    ({"input": torch.ones(6, 5)}, ValueError, r"projection to k_in must have shape \(5\); got \(4,\)"),
    ({"projection": PAIR}, ValueError, r"projection to k_out must have shape \(16, 3\); got \(5, 3\)"),
    (
        {"projection": (torch.ones(16, 3), torch.ones(32, 3))},
        ValueError,
        r"projection to k_in must have shape \(32, 4\); got \(32, 3\)",
    ),
    ({"projection": (torch.ones(16, 3), torch.ones(32))}, ValueError, r"projection to k_in must have shape \(32, 4\)"),
    (
        {"projection": (torch.ones(16, 3).int(), torch.ones(32, 4))},
        TypeError,
        "projection to k_out must be a floating-point tensor; got torch.int32",
    ),
    ({"queries": torch.ones(2, 16, 32).int()}, TypeError, "queries must be a floating-point tensor"),
    ({"offsets": torch.tensor([0, 7])}, ValueError, "offsets must start at 0 and end at T = 6; got 0 and 7"),
    ({"offsets": torch.tensor([0, 4, 2, 6])}, ValueError, "must not decrease"),
    ({"offsets": torch.tensor([0.0, 6.0])}, ValueError, "offsets must be int64"),
    ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "offsets must hold m \\+ 1 row numbers"),
    ({"order": torch.arange(5)}, ValueError, r"order must have shape \(6\); got \(5,\)"),
    ({"order": torch.arange(1, 7)}, ValueError, "order must be a permutation of 0 ... 5; got .* 1 to 6"),
    ({"order": torch.arange(6, device="meta")}, ValueError, "order must be on the device of input, cpu"),
    ({"queries": torch.ones(2, 16, 32, device="meta")}, ValueError, "queries must be on the device of input, cpu"),
    ({"offsets": torch.tensor([0, 6], device="meta")}, ValueError, "offsets must be on the CPU or on the device of"),
    (
        {"projection": ops.LayerProjection(3, 4, k_out=16, k_in=32, device="meta")},
        ValueError,
        "projection to k_out must be on the device of input, cpu",
    ),
]


def call(**changes: object) -> dict[str, object]:
    usual = {
        "input": torch.ones(6, 4),
        "grad_output": torch.ones(6, 3),
        "offsets": torch.tensor([0, 2, 6]),
        "queries": torch.ones(2, 16, 32),
        "projection": HANDLE,
    }
    return usual | changes


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_arguments(backend: str, changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.projected_group_influence(**call(**changes), backend=backend)
    # A pair says itself what k_out and k_in are, and so is never at odds with queries there.
    about_queries = "queries" in changes or (
        isinstance(changes.get("projection"), tuple) and changes["projection"][0].is_floating_point()
    )
    if not about_queries:
        arguments = call(**changes)
        del arguments["queries"]
        with pytest.raises(error, match=message):
            ops.projected_domain_gradients(**arguments)


def test_codes_of_a_missing_row_are_refused(backend: str) -> None:
    """The native kernel would write beyond its memory."""
    *tensors, projection = arguments()
    codes = projection.input_factor.clone()
    codes[7] = 16
    with pytest.raises(ValueError, match="projection must send column"):
        OP(*tensors, projection.output_factor, codes, 1.0, None, backend)
