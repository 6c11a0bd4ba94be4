"""Projected gradients of a table, against those of one-hot rows and against the whole gradient in float64."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from tikmix_fast import ops
from tikmix_fast.ops.common.projection import ProjectionKind
from tikmix_fast.ops.projected.lookup import projected_lookup_gradients

V, C, T = 90, 50, 40
OFFSETS = torch.tensor([0, 13, 13, 40])


def lookups(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (T,), generator=generator)
    ids[3] = ids[5]  # one row looked up twice in a domain
    return ids, torch.randn(T, C, generator=generator).to(dtype), torch.randperm(T, generator=generator)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("kind", get_args(ProjectionKind))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_the_projected_gradient_of_the_table(kind, ordered, dtype):
    ids, rows, order = lookups(dtype)
    projection = ops.LayerProjection(height=V, width=C, k_out=32, k_in=16, kind=kind, seed=3)
    given = {"order": order if ordered else None}
    found = projected_lookup_gradients(ids, rows, OFFSETS, projection, **given)
    for domain, (start, end) in enumerate(zip(OFFSETS[:-1].tolist(), OFFSETS[1:].tolist(), strict=True)):
        mine = order[start:end] if ordered else torch.arange(start, end)
        table = torch.zeros(V, C, dtype=torch.float64).index_add_(0, ids[mine], rows[mine].double())
        wanted = projection.project(table)
        scale = projection.project(table.abs()).abs().max().clamp_min(1)
        assert (found[domain] - wanted).abs().max() / scale < (2e-2 if dtype == torch.bfloat16 else 1e-6)
    hot = F.one_hot(ids, V).to(dtype)
    alike = ops.projected_domain_gradients(rows, hot, OFFSETS, projection, **given)
    assert (found - alike).abs().max() <= (2e-2 if dtype == torch.bfloat16 else 1e-6) * alike.abs().max()


@pytest.mark.parametrize("dim", [3, 8, 24])
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_dense_kinds_have_any_number_of_rows(kind, dim):
    ids, rows, _ = lookups()
    projection = ops.LayerProjection(height=V, width=C, k_out=dim, k_in=dim + 1, kind=kind, seed=3)
    found = projected_lookup_gradients(ids, rows, OFFSETS, projection)
    alike = ops.projected_domain_gradients(rows, F.one_hot(ids, V).float(), OFFSETS, projection)
    assert (found - alike).abs().max() <= 1e-6 * alike.abs().max()


def test_shapes_that_disagree_are_refused():
    ids, rows, _ = lookups()
    projection = ops.LayerProjection(height=V, width=C)
    with pytest.raises(ValueError, match="grad_rows"):
        projected_lookup_gradients(ids, rows[:, 1:], OFFSETS, projection)
    with pytest.raises(ValueError, match="ids"):
        projected_lookup_gradients(ids[1:], rows, OFFSETS, projection)
    with pytest.raises(ValueError, match="offsets"):
        projected_lookup_gradients(ids, rows, torch.tensor([0, 99]), projection)
