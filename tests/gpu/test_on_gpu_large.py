"""Tensors of more than 2**31 elements, where an index of 32 bits would wrap."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tikmix_fast import ops

pytestmark = pytest.mark.slow

BIG = 2**31


def need_memory(gpu: torch.device, gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(gpu)[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of free GPU memory; {free:.0f} are free")


def normal(gpu: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=gpu, generator=torch.Generator(gpu).manual_seed(sum(shape)))


def row_wise(input: Tensor, grad_output: Tensor, offsets: list[int], queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return influence row by row in float64, and the root of the summed squares of the products."""
    values = torch.zeros(len(queries), len(offsets) - 1, dtype=torch.float64, device=input.device)
    sizes = torch.zeros_like(values)
    for task, query in enumerate(queries):
        wide = query.double()
        for domain, (start, end) in enumerate(pairwise(offsets)):
            for first in range(start, end, 1 << 16):
                rows = slice(first, min(first + (1 << 16), end))
                products = (input[rows].double() @ wide.T) * grad_output[rows].double()
                values[task, domain] += products.sum()
                sizes[task, domain] += products.square().sum()
    return values, sizes.sqrt()


def test_rows(backend: str, gpu: torch.device) -> None:
    need_memory(gpu, 30)
    rows, height, width = BIG // 2048 + 77, 64, 2048
    assert rows * width > BIG
    input, grad_output, queries = normal(gpu, rows, width), normal(gpu, rows, height), normal(gpu, 2, height, width)
    offsets = [0, 1000, rows - 300, rows]
    grad_weight = torch.zeros(height, width, device=gpu)
    values = ops.group_influence(
        input, grad_output, torch.tensor(offsets, device=gpu), queries, grad_weight=grad_weight, backend=backend
    )
    right, scale = row_wise(input, grad_output, offsets, queries)
    assert ((values - right).abs() <= 2e-2 * scale).all()
    total = torch.zeros(height, width, dtype=torch.float64, device=gpu)
    for first in range(0, rows, 1 << 17):
        part = slice(first, first + (1 << 17))
        total += grad_output[part].double().T @ input[part].double()
    torch.testing.assert_close(grad_weight.double(), total, rtol=0, atol=1e-3 * float(total.abs().max()))


def test_queries_and_weights(backend: str, gpu: torch.device) -> None:
    need_memory(gpu, 50)
    rows, height, width, tasks = 96, 16384, 16448, 9
    assert tasks * height * width > BIG
    input, grad_output, queries = normal(gpu, rows, width), normal(gpu, rows, height), normal(gpu, tasks, height, width)
    offsets = [0, 40, rows]
    values = ops.group_influence(
        input, grad_output, torch.tensor(offsets, device=gpu), ops.pack_queries(queries), backend=backend
    )
    right, scale = row_wise(input, grad_output, offsets, queries)
    assert ((values - right).abs() <= 2e-2 * scale).all()


def test_a_total(backend: str, gpu: torch.device) -> None:
    need_memory(gpu, 40)
    rows, size = 64, 46400
    assert size * size > BIG
    input, grad_output, queries = normal(gpu, rows, size), normal(gpu, rows, size), normal(gpu, 1, size, size)
    grad_weight = torch.zeros(size, size, device=gpu)
    offsets = [0, 31, rows]
    values = ops.group_influence(
        input, grad_output, torch.tensor(offsets, device=gpu), queries, grad_weight=grad_weight, backend=backend
    )
    right, scale = row_wise(input, grad_output, offsets, queries)
    assert ((values - right).abs() <= 2e-2 * scale).all()
    for part in (slice(0, 200), slice(size // 2, size // 2 + 200), slice(size - 200, size)):
        expected = grad_output[:, part].double().T @ input.double()
        torch.testing.assert_close(grad_weight[part].double(), expected, rtol=0, atol=1e-3)


def test_rows_far_apart(backend: str, gpu: torch.device) -> None:
    need_memory(gpu, 10)
    far = BIG // 2 + 8
    storage = torch.zeros(2 * far + 16, dtype=torch.bfloat16, device=gpu)
    input = storage.as_strided((3, 16), (far, 1))
    input.copy_(torch.arange(48.0, device=gpu).view(3, 16))
    grad_output = torch.zeros(3, 8, dtype=torch.bfloat16, device=gpu)
    grad_output[:, 0] = torch.tensor([1.0, 10.0, 100.0])
    queries = torch.zeros(1, 8, 16, dtype=torch.bfloat16, device=gpu)
    queries[:, 0] = 1
    offsets = torch.tensor([0, 1, 2, 3], device=gpu)
    values = ops.group_influence(input, grad_output, offsets, queries, backend=backend)
    expected = torch.tensor([[120.0, 3760.0, 63200.0]], dtype=torch.float64)
    torch.testing.assert_close(values.cpu(), expected, rtol=1e-2, atol=0)


def test_the_projected_op(backend: str, gpu: torch.device) -> None:
    need_memory(gpu, 30)
    rows, size = BIG // 2048 + 77, 2048
    input, grad_output = normal(gpu, rows, size), normal(gpu, rows, 64)
    projection = ops.LayerProjection(64, size, k_out=64, k_in=64, device=str(gpu))
    queries = projection.project(normal(gpu, 2, 64, size))
    offsets = [0, 1000, rows - 300, rows]
    values = ops.projected_group_influence(
        input, grad_output, torch.tensor(offsets, device=gpu), queries, projection, backend=backend
    )
    output_matrix, input_matrix = projection.matrices(torch.float64)
    right, scale = row_wise(input, grad_output, offsets, output_matrix.T @ queries.double() @ input_matrix)
    assert ((values - right).abs() <= 2e-2 * scale).all()
