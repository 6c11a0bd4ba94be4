"""The kernels as functions on tensors: one schema, a float64 reference, one file per backend."""

from __future__ import annotations

from tikmix_fast.ops.dispatch import available_backends, use_backend
from tikmix_fast.ops.functions import group_influence
from tikmix_fast.ops.packing import PackedQueries, pack_queries

__all__ = ["PackedQueries", "available_backends", "group_influence", "pack_queries", "use_backend"]
