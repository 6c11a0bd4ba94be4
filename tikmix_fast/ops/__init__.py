"""The kernels as functions on tensors: one schema, a float64 reference, one file per backend."""

from __future__ import annotations

from tikmix_fast.ops.dispatch import available_backends, use_backend
from tikmix_fast.ops.functions import group_influence
from tikmix_fast.ops.packing import PackedQueries, pack_queries
from tikmix_fast.ops.projected import projected_domain_gradients, projected_group_influence
from tikmix_fast.ops.projection import LayerProjection
from tikmix_fast.ops.projection_error import projection_stderr

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
