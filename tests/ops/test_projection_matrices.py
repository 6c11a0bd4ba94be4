"""The matrices a projection stands for: their form, their moments, and bits that must never change."""

from __future__ import annotations

import hashlib
import statistics
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tikmix_fast import ops
from tikmix_fast.ops.common.projection import ProjectionKind, _normal_table, factor_matrix

KINDS = get_args(ProjectionKind)


def digest(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.numpy().tobytes(), digest_size=8).hexdigest()


# What every machine must draw, little-endian int32 (countsketch) or int8. A change here changes people's results.
GOLDEN = {
    "countsketch": ("83d84e625856ee30", "48f91d177ae7a274"),
    "rademacher": ("86d7a53c69d9b573", "9e332798e3d5606a"),
    "gaussian": ("19233eea09f211e7", "2662631efac37292"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_these(kind: str) -> None:
    projection = ops.LayerProjection(200, 333, k_out=32, k_in=64, kind=kind, seed=42, layer="blocks.0.attention")
    assert (digest(projection.output_factor), digest(projection.input_factor)) == GOLDEN[kind]


def test_the_normal_table_does_not_depend_on_the_mathematics_library() -> None:
    """Every quantile is so far from where rounding turns that an error of 1e-9 in it changes no entry."""
    half = 1 << 15
    steps = [29 * statistics.NormalDist().inv_cdf(0.5 + (i + 0.5) / (2 * half)) for i in range(half)]
    assert min(abs(step % 1 - 0.5) for step in steps) > 1e-6
    table = torch.from_numpy(_normal_table())
    assert table[half:].tolist() == [round(step) for step in steps]
    assert torch.equal(table, -table.flip(0))
    assert table.max() == 125


def test_moments_of_the_normal_table() -> None:
    """As the documentation states them."""
    table = torch.from_numpy(_normal_table()).double()
    variance = table.square().mean()
    assert table.unique().numel() == 229
    assert abs(float(table.pow(4).mean() / variance.square()) - 2.9990) < 1e-4
    assert abs(125 / float(variance.sqrt()) - 4.31) < 5e-3


@given(
    height=st.integers(0, 300),
    power=st.integers(4, 8),
    seed=st.integers(0, 2**64 - 1),
    layer=st.one_of(st.integers(0, 2**64 - 1), st.text(max_size=8)),
)
def test_a_countsketch_is_block_permuted(height: int, power: int, seed: int, layer: int | str) -> None:
    dim = 1 << power
    matrix = ops.LayerProjection(height, 3, k_out=dim, k_in=16, seed=seed, layer=layer).matrices()[0]
    assert matrix.shape == (dim, height)
    assert (matrix.abs().sum(0) == 1).all()  # one entry of +-1 per column
    for start in range(0, height, dim):
        assert matrix[:, start : start + dim].abs().sum(1).max() <= 1  # columns of a block never meet


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_the_unscaled_matrices(kind: str) -> None:
    projection = ops.LayerProjection(90, 70, k_out=32, k_in=64, kind=kind)
    output, input = projection.matrices(torch.float64)
    product = factor_matrix(projection.output_factor, 32, torch.float64)[:, :70] * factor_matrix(
        projection.input_factor, 64, torch.float64
    ).sum(0)
    torch.testing.assert_close(projection.scale * product, output[:, :70] * input.sum(0), rtol=1e-13, atol=1e-13)
    if kind != "countsketch":
        # Exact in 16 bits, so that no backend rounds what it multiplies with.
        for factor in (projection.output_factor, projection.input_factor):
            assert torch.equal(factor.bfloat16().double(), factor.double())
            assert torch.equal(factor.half().double(), factor.double())


@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_layer_holds_a_smaller_ones_columns(kind: str) -> None:
    small = ops.LayerProjection(50, 130, k_out=32, k_in=32, kind=kind)
    large = ops.LayerProjection(513, 700, k_out=32, k_in=32, kind=kind)
    for a, b in zip(small.matrices(), large.matrices(), strict=True):
        assert torch.equal(a, b[:, : a.shape[1]])


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_more_dense_rows_hold_fewer(kind: str) -> None:
    few = ops.LayerProjection(50, 60, k_out=20, k_in=3, kind=kind)
    many = ops.LayerProjection(50, 60, k_out=33, k_in=64, kind=kind)
    assert torch.equal(few.output_factor, many.output_factor[:20])
    assert torch.equal(few.input_factor, many.input_factor[:3])


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_layers_and_sides_differ(kind: str) -> None:
    def draw(seed: int = 0, layer: int | str = 0) -> ops.LayerProjection:
        return ops.LayerProjection(256, 256, k_out=32, k_in=32, kind=kind, seed=seed, layer=layer)

    base = draw()
    factors = [base.output_factor, base.input_factor]
    for other in (draw(seed=1), draw(seed=1 << 32), draw(layer=1), draw(layer=1 << 32), draw(layer="a"), draw(0, "b")):
        factors += [other.output_factor, other.input_factor]
    for i, a in enumerate(factors):
        for b in factors[:i]:
            assert (a == b).double().mean() < 0.6  # signs agree half of the time
    assert draw(layer="a") == draw(layer="a")
    assert torch.equal(draw(layer="a").input_factor, draw(layer="a").input_factor)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gram_matrix_is_the_identity_in_expectation(kind: str) -> None:
    draws = 400
    total, squares = torch.zeros(2, 40, 40, dtype=torch.float64).unbind()
    for seed in range(draws):
        matrix = ops.LayerProjection(40, 1, k_out=16, k_in=16, kind=kind, seed=seed).matrices(torch.float64)[0]
        gram = matrix.T @ matrix
        total += gram
        squares += gram.square()
    mean = total / draws
    error = (squares / draws - mean.square()).clamp(min=1e-18).sqrt() / draws**0.5
    scores = (mean - torch.eye(40, dtype=torch.float64)) / error
    assert scores.abs().max() < 4.8
    if kind != "gaussian":
        torch.testing.assert_close(mean.diagonal(), torch.ones(40, dtype=torch.float64))


def test_signs_and_normals_look_independent_within_a_matrix() -> None:
    for kind in ("rademacher", "gaussian"):
        matrix = ops.LayerProjection(2000, 1, k_out=64, k_in=16, kind=kind).matrices(torch.float64)[0] * 8
        assert abs(float(matrix.mean())) < 4 / matrix.numel() ** 0.5
        for lag in (1, 2, 4, 8, 32, 128):
            along = (matrix[:, lag:] * matrix[:, :-lag]).mean() * (64 * (2000 - lag)) ** 0.5
            assert abs(float(along)) < 4
        down = (matrix[1:] * matrix[:-1]).mean() * (63 * 2000) ** 0.5
        assert abs(float(down)) < 4


def test_masks_of_a_countsketch_are_uniform() -> None:
    codes = ops.LayerProjection(16 * 8000, 1, k_out=16, k_in=16).output_factor
    masks = torch.where(codes < 0, ~codes, codes)[::16]
    counts = torch.bincount(masks, minlength=16).double()
    assert float(((counts - 500) ** 2 / 500).sum()) < 37.7  # chi-squared with 15 degrees of freedom: 0.1 %
    assert abs(float((codes < 0).double().mean()) - 0.5) < 4 * 0.5 / codes.numel() ** 0.5


def test_project_is_the_two_products() -> None:
    gradients = torch.randn(2, 3, 40, 50)
    for kind in KINDS:
        projection = ops.LayerProjection(40, 50, k_out=32, k_in=16, kind=kind)
        output, input = projection.matrices(torch.float64)
        expected = torch.einsum("ao,xyoi,bi->xyab", output, gradients.double(), input)
        torch.testing.assert_close(projection.project(gradients.double()), expected)
        torch.testing.assert_close(projection.project(gradients).double(), expected, rtol=1e-4, atol=1e-4)
        assert projection.project(gradients.bfloat16()).dtype == torch.float32


def test_defaults_of_the_process_are_not_the_drawn_tensors() -> None:
    before = torch.get_default_dtype()
    expected = ops.LayerProjection(40, 50, k_out=32, k_in=16, kind="gaussian")
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            drawn = ops.LayerProjection(40, 50, k_out=32, k_in=16, kind="gaussian")
            rows = torch.ones(3, 40, dtype=torch.float32, device="cpu")
            sketch = ops.LayerProjection(40, 50)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(drawn.output_factor, expected.output_factor)
    assert drawn.input_factor.device.type == "cpu"
    assert sketch.output_factor.device == rows.device


BAD = [
    ({"kind": "sjlt"}, "kind must be one of countsketch, rademacher, gaussian; got 'sjlt'"),
    ({"k_out": 48}, "k_out must be a power of two from 16 to 1024 for a countsketch; got 48"),
    ({"k_in": 8}, "k_in must be a power of two from 16"),
    ({"k_in": 2048}, "k_in must be a power of two from 16"),
    ({"k_in": 0, "kind": "gaussian"}, "k_in must be in 1"),
    ({"height": -1}, "height must be in 0"),
    ({"width": 1 << 31}, "width must be in 0"),
    ({"seed": -1}, "seed must be in 0"),
    ({"seed": 1 << 64}, "seed must be in 0"),
    ({"layer": -1}, "layer must be a name or in 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_handles_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.LayerProjection(**({"height": 5, "width": 6} | changes))


def test_gradients_of_another_shape_are_refused() -> None:
    projection = ops.LayerProjection(5, 6)
    for shape in ((6, 5), (5,), (2, 5, 7)):
        with pytest.raises(ValueError, match=r"gradients must have shape \(..., 5, 6\)"):
            projection.project(torch.zeros(shape))
