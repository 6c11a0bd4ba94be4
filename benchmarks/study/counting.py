"""Floating point operations, by the usual count of matrix products.

N is the number of weights in matrix products: four times width squared for the attention of a layer, eight times for
its MLP, and the head. Embeddings are looked up and count nothing. A token costs 2 N forward and 6 N forward and
backward. Training and mixing alike leave out attention scores, norms, the optimizer, solvers and curve fits.
"""

from __future__ import annotations

from tikmix_fast.demo.gpt import BYTES, GPTSettings

__all__ = ["forward", "inner_products", "training", "weights"]


def weights(model: GPTSettings) -> int:
    """Return N."""
    return 12 * model.layers * model.width**2 + BYTES * model.width


def forward(model: GPTSettings, tokens: int) -> int:
    """Return the operations of a forward pass."""
    return 2 * weights(model) * tokens


def training(model: GPTSettings, tokens: int) -> int:
    """Return the operations of a forward and a backward pass."""
    return 6 * weights(model) * tokens


def inner_products(model: GPTSettings, count: int) -> int:
    """Return the operations of ``count`` inner products of two gradients."""
    return 2 * weights(model) * count
