"""group_influence as torch sees it: schema, tracing, compilation, and no derivative."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.kernels import linear
from tikmix_fast import ops

OP = torch.ops.tikmix_fast.group_influence.default


def arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    input, grad_output, queries = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((20, 5), (20, 4), (3, 4, 5))
    )
    return input, grad_output, torch.tensor([0, 6, 6, 20]), queries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("order", [None, torch.randperm(20)], ids=["in-order", "order"])
@pytest.mark.parametrize("grad_weight", [None, torch.zeros(4, 5)], ids=["none", "grad-weight"])
def test_opcheck(backend: str, dtype: torch.dtype, order: Tensor | None, grad_weight: Tensor | None) -> None:
    grad_weight = None if grad_weight is None else grad_weight.to(dtype)
    torch.library.opcheck(OP, (*arguments(dtype), None, order, grad_weight, backend))


def test_the_schema_is_the_contract() -> None:
    assert str(OP._schema) == (
        "tikmix_fast::group_influence(Tensor input, Tensor grad_output, Tensor offsets, Tensor queries, "
        "Tensor? panels, Tensor? order, Tensor(a!)? grad_weight, str? backend) -> Tensor"
    )


COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_without_a_graph_break(backend: str, compiler: str) -> None:
    torch.compiler.reset()  # each backend would otherwise count as one more recompilation of the same function

    def influence(
        input: Tensor, grad_output: Tensor, offsets: Tensor, packed: ops.PackedQueries, grad_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        values = ops.group_influence(input * 2, grad_output, offsets, packed, grad_weight=grad_weight, backend=backend)
        return values.sum(0), grad_weight + 1

    input, grad_output, offsets, queries = arguments()
    compiled = torch.compile(influence, fullgraph=True, backend=compiler)
    packed = ops.pack_queries(queries)
    results = []
    for function in (influence, compiled):
        grad_weight = torch.ones(4, 5)
        results.append((*function(input, grad_output, offsets, packed, grad_weight), grad_weight))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)
    torch.testing.assert_close(results[1][2], 1 + 2 * grad_output.T @ input)


def test_compiles_with_a_changing_number_of_rows_and_packs_inside(backend: str) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def influence(input: Tensor, grad_output: Tensor, offsets: Tensor, queries: Tensor, order: Tensor) -> Tensor:
        return ops.group_influence(input, grad_output, offsets, ops.pack_queries(queries), order=order, backend=backend)

    input, grad_output, _, queries = arguments()
    for rows in (20, 7, 13):
        order, offsets = torch.arange(rows).flip(0), torch.tensor([0, 3, rows])
        call = (input[:rows], grad_output[:rows], offsets, queries)
        expected = ops.group_influence(*call, order=order, backend=backend)
        torch.testing.assert_close(influence(*call, order), expected, rtol=1e-12, atol=1e-12)


def test_use_backend_inside_a_compiled_function_is_refused() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def influence(*call: Tensor) -> Tensor:
        with ops.use_backend("reference"):
            return ops.group_influence(*call)

    with pytest.raises(Exception, match="use_backend"):
        influence(*arguments())


@pytest.mark.parametrize(("which", "name"), [(0, "input"), (1, "grad_output"), (3, "queries")])
def test_a_derivative_is_refused_and_not_taken_silently(backend: str, which: int, name: str) -> None:
    call = list(arguments())
    expected = ops.group_influence(*call, backend=backend)
    call[which].requires_grad_()
    with pytest.raises(RuntimeError, match=f"no derivative, but {name} requires grad.*no_grad"):
        ops.group_influence(*call, backend=backend)
    with torch.no_grad():
        values = ops.group_influence(*call, backend=backend)
    assert torch.equal(values, expected)
    assert not values.requires_grad


def test_a_grad_weight_that_requires_grad_is_refused(backend: str) -> None:
    grad_weight = torch.zeros(4, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="no derivative, but grad_weight requires grad"):
        ops.group_influence(*arguments(), grad_weight=grad_weight, backend=backend)
    assert (grad_weight == 0).all()


def test_a_derivative_is_refused_when_compiled() -> None:
    input, grad_output, offsets, queries = arguments()
    compiled = torch.compile(ops.group_influence, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="no derivative, but input requires grad"):
        compiled(input.requires_grad_(), grad_output, offsets, queries)


def test_runs_in_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        input, grad_output, offsets, queries = arguments()
        grad_weight = torch.zeros(4, 5)
        ops.group_influence(input, grad_output, offsets, queries, grad_weight=grad_weight, backend=backend)
        torch.testing.assert_close(grad_weight, grad_output.T @ input)


def test_runs_inside_an_autograd_function(backend: str) -> None:
    """Backward is where the op belongs: grad mode is off there, and saved tensors require grad."""
    input, grad_output, offsets, queries = arguments()
    rows = input.clone().requires_grad_()
    results = []

    def measure(grad_output: Tensor, grad_weight: Tensor) -> None:
        results.append(
            ops.group_influence(rows, grad_output, offsets, queries, grad_weight=grad_weight, backend=backend)
        )

    weight = torch.randn(4, 5, requires_grad=True)
    linear(rows, weight, measure).backward(grad_output)
    torch.testing.assert_close(weight.grad, grad_output.T @ input)
    assert torch.equal(results[0], ops.group_influence(input, grad_output, offsets, queries, backend=backend))


def test_forward_mode_is_refused_too(backend: str) -> None:
    input, *rest = arguments()
    with pytest.raises(RuntimeError, match="no derivative, but input has a tangent"), forward_ad.dual_level():
        ops.group_influence(forward_ad.make_dual(input, input), *rest, backend=backend)
    with pytest.raises(RuntimeError, match="no derivative, but input has a tangent"):
        torch.func.jvp(lambda value: ops.group_influence(value, *rest, backend=backend), (input,), (input,))
