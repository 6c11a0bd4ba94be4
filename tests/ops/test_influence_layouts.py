"""group_influence reads any strides, any order of rows, and writes nothing but grad_weight."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.layouts import contiguous, every_other_column, every_third_row, transposed, unaligned
from tikmix_fast import ops
from tikmix_fast.testing import domain_gradients

OFFSETS = torch.tensor([0, 13, 13, 40])
ROWS, HEIGHT, WIDTH, TASKS = 40, 26, 37, 3


def assert_same(values: Tensor, expected: Tensor) -> None:
    """Equal up to the order of float64 sums: the native kernel's are the same bits, torch's own depend on strides."""
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-11)


LAYOUTS = [contiguous, transposed, every_other_column, every_third_row, unaligned]


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return tuple(
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((ROWS, WIDTH), (ROWS, HEIGHT), (TASKS, HEIGHT, WIDTH))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("lay_out", LAYOUTS)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["input", "grad_output", "queries"])
def test_strides_change_nothing(backend: str, which: int, lay_out, dtype: torch.dtype) -> None:
    tensors = list(problem(dtype))
    expected = ops.group_influence(tensors[0], tensors[1], OFFSETS, tensors[2], backend=backend)
    tensors[which] = lay_out(tensors[which])
    assert_same(ops.group_influence(tensors[0], tensors[1], OFFSETS, tensors[2], backend=backend), expected)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("which", [0, 1], ids=["input", "grad_output"])
def test_expanded_inputs(backend: str, which: int, dim: int) -> None:
    tensors = list(problem(torch.float32))
    tensors[which] = tensors[which].narrow(dim, 0, 1).expand(tensors[which].shape)
    values = ops.group_influence(tensors[0], tensors[1], OFFSETS, tensors[2], backend=backend)
    tensors[which] = tensors[which].clone(memory_format=torch.contiguous_format)
    assert_same(values, ops.group_influence(tensors[0], tensors[1], OFFSETS, tensors[2], backend=backend))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_queries(backend: str, dim: int) -> None:
    input, grad_output, queries = problem(torch.float32)
    queries = queries.narrow(dim, 0, 1).expand(queries.shape)
    values = ops.group_influence(input, grad_output, OFFSETS, queries, backend=backend)
    copy = queries.clone(memory_format=torch.contiguous_format)
    assert_same(values, ops.group_influence(input, grad_output, OFFSETS, copy, backend=backend))


@pytest.mark.parametrize("lay_out", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_grad_weight_is_added_to_in_place_and_its_surroundings_are_not(
    backend: str, lay_out, dtype: torch.dtype
) -> None:
    input, grad_output, queries = problem(torch.float32)
    grad_weight = lay_out(torch.full((HEIGHT, WIDTH), 3.0, dtype=dtype))
    everything = torch.empty(0, dtype=dtype).set_(grad_weight.untyped_storage())
    untouched = everything.clone()
    version = grad_weight._version

    ops.group_influence(input, grad_output, OFFSETS, queries, grad_weight=grad_weight, backend=backend)

    assert grad_weight._version > version
    right = 3.0 + (grad_output.double().T @ input.double())
    torch.testing.assert_close(grad_weight.double(), right, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)
    torch.testing.assert_close(
        everything.clone().as_strided_(grad_weight.shape, grad_weight.stride(), grad_weight.storage_offset()),
        grad_weight,
    )
    grad_weight.copy_(torch.full((HEIGHT, WIDTH), 3.0, dtype=dtype))
    assert torch.equal(everything.isnan(), untouched.isnan())
    assert torch.equal(everything.nan_to_num(), untouched.nan_to_num())


def test_reading_changes_no_argument(backend: str) -> None:
    input, grad_output, queries = problem(torch.float32)
    order = torch.randperm(ROWS)
    arguments = (input, grad_output, OFFSETS, queries, order)
    before = [tensor.clone() for tensor in arguments]
    ops.group_influence(*arguments[:4], order=order, backend=backend)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(arguments, before, strict=True))


@pytest.mark.parametrize("every", [1, 2], ids=["contiguous", "strided"])
def test_order_equals_a_sorted_copy(backend: str, every: int) -> None:
    input, grad_output, queries = problem(torch.float32)
    permutation = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    order = permutation.repeat_interleave(every)[::every]
    offsets = OFFSETS.repeat_interleave(every)[::every]
    one, other = torch.zeros(HEIGHT, WIDTH), torch.zeros(HEIGHT, WIDTH)
    values = ops.group_influence(input, grad_output, offsets, queries, order=order, grad_weight=one, backend=backend)
    copied = ops.group_influence(
        input[permutation], grad_output[permutation], OFFSETS, queries, grad_weight=other, backend=backend
    )
    assert_same(values, copied)
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


def test_strides_beyond_32_bits(backend: str) -> None:
    far = 2**31 + 5
    # Only the touched pages of this allocation become real memory.
    storage = torch.empty(far + 3, dtype=torch.bfloat16)
    input = storage.as_strided((2, 3), (far, 1))
    input.copy_(torch.arange(6.0).view(2, 3))
    grad_output, offsets = torch.tensor([[1.0], [10.0]]), torch.tensor([0, 1, 2])
    values = ops.group_influence(input, grad_output, offsets, torch.ones(1, 1, 3), backend=backend)
    assert values.tolist() == [[3.0, 120.0]]


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Tensor | None]:
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    rows, height, width = sum(sizes), draw(st.integers(1, 70)), draw(st.integers(1, 80))
    tasks = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])

    def tensor(*shape: int) -> Tensor:
        return draw(st.sampled_from(LAYOUTS))(torch.randn(*shape, generator=generator).to(draw(dtypes)))

    return {
        "input": tensor(rows, width),
        "grad_output": tensor(rows, height),
        "offsets": torch.tensor([0, *sizes]).cumsum(0),
        "queries": tensor(tasks, height, width),
        "order": torch.randperm(rows, generator=generator) if draw(st.booleans()) else None,
        "grad_weight": tensor(height, width) if draw(st.booleans()) else None,
    }


@settings(deadline=None, max_examples=150)
@given(call=calls())
def test_any_layout_is_within_the_rounding_error_bound_of_float32(call: dict[str, Tensor | None]) -> None:
    """The bound is the textbook one for sums of T products, so it holds for any data and shape.

    Where everything is bfloat16, the gradient may besides be rounded to it before it meets the queries.
    """
    input, grad_output, offsets, queries = (call[name] for name in ("input", "grad_output", "offsets", "queries"))
    order, grad_weight = call["order"], call["grad_weight"]
    before = None if grad_weight is None else grad_weight.double()
    gradients = domain_gradients(input, grad_output, offsets, order)
    sizes = domain_gradients(input.abs(), grad_output.abs(), offsets, order)  # sums of absolute products
    unit = torch.finfo(torch.float32).eps
    depth = input.shape[0] + 70  # rows, and the lanes of a dot product
    for backend in ("reference", "cpu"):
        if ops.available_backends()[backend] is not None:
            continue
        out = None if grad_weight is None else grad_weight.clone()
        values = ops.group_influence(
            input, grad_output, offsets, queries, order=order, grad_weight=out, backend=backend
        )
        exact = torch.einsum("noi,moi->nm", queries.double(), gradients)
        bound = depth * unit * torch.einsum("noi,moi->nm", queries.double().abs(), sizes)
        if {input.dtype, grad_output.dtype, queries.dtype} == {torch.bfloat16}:
            half_unit = torch.finfo(torch.bfloat16).eps / 2
            bound += half_unit * torch.einsum("noi,moi->nm", queries.double().abs(), gradients.abs())
        assert ((values - exact).abs() <= bound + 1e-30).all()
        if out is not None:
            rounding = torch.finfo(out.dtype).eps * (before + gradients.sum(0)).abs()
            assert (
                (out.double() - before - gradients.sum(0)).abs()
                <= depth * unit * (sizes.sum(0) + before.abs()) + rounding
            ).all()


def test_fresh_memory_of_the_native_kernel_is_never_read() -> None:
    """glibc fills what it allocates with large numbers here; a tile or panel read before it is written shows them."""
    script = """
import torch
from tikmix_fast import ops
generator = torch.Generator().manual_seed(0)
for rows, height, width in ((5, 7, 9), (300, 100, 130), (1, 1, 1)):
    input, grad_output = torch.randn(rows, width, generator=generator), torch.randn(rows, height, generator=generator)
    queries, offsets = torch.randn(5, height, width, generator=generator), torch.tensor([0, 0, rows // 2, rows])
    total = torch.zeros(height, width)
    values = ops.group_influence(input, grad_output, offsets, queries, grad_weight=total, backend="cpu")
    right = ops.group_influence(input, grad_output, offsets, queries, backend="reference")
    torch.testing.assert_close(values, right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, grad_output.T @ input, rtol=1e-4, atol=1e-4)
"""
    environment = os.environ | {"MALLOC_PERTURB_": "128", "GLIBC_TUNABLES": "glibc.malloc.perturb=128"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
