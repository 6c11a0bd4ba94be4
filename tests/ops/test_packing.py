"""Packed queries mean what the tensor meant."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tikmix_fast import ops
from tikmix_fast.ops.backends import cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_packed_queries_give_the_same_values(backend: str, dtype: torch.dtype) -> None:
    input, grad_output, offsets = torch.randn(9, 6), torch.randn(9, 7), torch.tensor([0, 4, 9])
    queries = torch.randn(3, 6, 7).to(dtype).mT
    packed = ops.pack_queries(queries)
    assert packed.shape == (3, 7, 6)
    assert packed.tensor.dtype == dtype
    assert packed.tensor.is_contiguous()
    assert torch.equal(
        ops.group_influence(input, grad_output, offsets, packed, backend=backend),
        ops.group_influence(input, grad_output, offsets, queries.contiguous(), backend=backend),
    )


SHAPES = [(1, 1, 1), (3, 12, 32), (2, 49, 65), (5, 100, 130), (9, 7, 40), (0, 5, 6), (4, 0, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_every_instruction_set_reads_its_packed_queries(
    instruction_set: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    tasks, height, width = shape
    generator = torch.Generator().manual_seed(4)
    queries = torch.randn(shape, generator=generator).to(dtype)
    packed = ops.pack_queries(queries)
    assert packed.panels is not None
    for rows_dtype in (torch.float32, torch.bfloat16):
        input, grad_output = (torch.randn(30, size, generator=generator).to(rows_dtype) for size in (width, height))
        offsets = torch.tensor([0, 11, 11, 30])
        values = ops.group_influence(input, grad_output, offsets, packed, backend="cpu")
        assert values.shape == (tasks, 3)
        assert torch.equal(values, ops.group_influence(input, grad_output, offsets, queries, backend="cpu"))


def test_a_handle_packed_for_another_instruction_set_is_still_right(monkeypatch: pytest.MonkeyPatch) -> None:
    input, grad_output, offsets = torch.randn(9, 40), torch.randn(9, 30), torch.tensor([0, 4, 9])
    queries = torch.randn(3, 30, 40)
    names = cpu.instruction_sets()
    handles = []
    for name in names:
        monkeypatch.setenv(cpu.INSTRUCTION_SET_VARIABLE, name)
        handles.append(ops.pack_queries(queries))
    for name in names:
        monkeypatch.setenv(cpu.INSTRUCTION_SET_VARIABLE, name)
        expected = ops.group_influence(input, grad_output, offsets, queries)
        for handle in handles:
            assert torch.equal(ops.group_influence(input, grad_output, offsets, handle), expected)


def test_what_are_no_panels_is_not_read() -> None:
    queries = torch.randn(3, 30, 40)
    packed = ops.pack_queries(queries)
    assert packed.panels is not None
    others = [
        ops.pack_queries(torch.randn(3, 10, 10)).panels,
        packed.panels.double(),
        packed.panels.transpose(3, 4).contiguous().transpose(3, 4),
    ]
    call = torch.randn(9, 40), torch.randn(9, 30), torch.tensor([0, 4, 9])
    for panels in others:
        handle = dataclasses.replace(packed, panels=panels)
        assert torch.equal(ops.group_influence(*call, handle), ops.group_influence(*call, queries))
    with pytest.raises(ValueError, match="panels must be on the device of tensor, cpu; got meta"):
        dataclasses.replace(packed, panels=packed.panels.to("meta"))


def test_packing_sees_values_and_not_bytes() -> None:
    call = torch.randn(9, 40), torch.randn(9, 30), torch.tensor([0, 4, 9])
    queries = torch.randn(3, 30, 40)
    expected = ops.group_influence(*call, queries)
    assert torch.equal(ops.group_influence(*call, ops.pack_queries(torch._neg_view(queries))), -expected)
    zeros = ops.pack_queries(torch._efficientzerotensor(3, 30, 40))
    assert (ops.group_influence(*call, zeros) == 0).all()


def test_packing_is_traced() -> None:
    with FakeTensorMode():
        packed = ops.pack_queries(torch.randn(2, 13, 33))
        assert packed.panels is not None
        shape = packed.panels.shape
    assert ops.pack_queries(torch.randn(2, 13, 33)).panels.shape == shape
    for queries in (torch.randn(2, 13, 33), torch.randn(2, 13, 33).mT, torch.randn(2, 3, 4, dtype=torch.float64)):
        torch.library.opcheck(torch.ops.tikmix_fast.pack_queries.default, (queries,))


def test_packing_drops_the_graph() -> None:
    assert not ops.pack_queries(torch.ones(1, 2, 3, requires_grad=True)).tensor.requires_grad


def test_the_handle_is_frozen() -> None:
    packed = ops.pack_queries(torch.ones(1, 2, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed.tensor = torch.ones(1, 2, 3)


def test_bad_queries_are_refused() -> None:
    with pytest.raises(ValueError, match=r"queries must have shape \(n, O, I\); got \(2, 3\)"):
        ops.pack_queries(torch.ones(2, 3))
    with pytest.raises(TypeError, match="queries must be a floating-point tensor; got <class 'list'>"):
        ops.pack_queries([[[1.0]]])
    with pytest.raises(TypeError, match=r"queries must be a floating-point tensor; got torch\.int32"):
        ops.pack_queries(torch.ones(1, 2, 3, dtype=torch.int32))
