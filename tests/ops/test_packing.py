"""Packed queries mean what the tensor meant."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tikmix_fast import ops


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


def test_packing_drops_the_graph() -> None:
    assert not ops.pack_queries(torch.ones(1, 2, 3, requires_grad=True)).tensor.requires_grad


def test_the_handle_is_frozen() -> None:
    packed = ops.pack_queries(torch.ones(1, 2, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed.tensor = torch.ones(1, 2, 3)


def test_bad_queries_are_refused() -> None:
    with pytest.raises(ValueError, match=r"queries must have shape \(n, O, I\); got \(2, 3\)"):
        ops.pack_queries(torch.ones(2, 3))
    with pytest.raises(TypeError, match="queries must be a floating-point tensor"):
        ops.pack_queries(torch.ones(1, 2, 3, dtype=torch.int32))
