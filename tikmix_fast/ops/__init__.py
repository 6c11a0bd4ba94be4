"""The kernels as functions on tensors: one schema per op, a float64 reference, one folder per backend."""

from __future__ import annotations

from tikmix_fast.ops.common.projection import LayerProjection
from tikmix_fast.ops.dispatch import available_backends, use_backend
from tikmix_fast.ops.exact.functions import group_influence
from tikmix_fast.ops.exact.packing import PackedQueries, pack_queries
from tikmix_fast.ops.projected.error import projection_stderr
from tikmix_fast.ops.projected.functions import projected_domain_gradients, projected_group_influence

__all__ = [
    "LayerProjection",
    "PackedQueries",
    "available_backends",
    "group_influence",
    "pack_queries",
    "projected_domain_gradients",
    "projected_group_influence",
    "projection_stderr",
    "use_backend",
]
