"""The native CountSketch of rows, exactly: sums of small integers have no rounding."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tikmix_fast import ops
from tikmix_fast.ops.backends.cpu.projected import sketch_rows
from tikmix_fast.ops.common.projection import factor_matrix

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = ["f32", "bf16", "f16"]


def codes_of(columns: int, dim: int, seed: int = 0) -> Tensor:
    return ops.LayerProjection(1, columns, k_in=dim, seed=seed).input_factor


def integers(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 10007 + columns)
    return torch.randint(-8, 9, (rows, columns), generator=generator).to(dtype)


def layouts(rows: Tensor) -> dict[str, Tensor]:
    """The same numbers, laid out in memory in every way, surrounded by NaN."""
    count, columns = rows.shape
    nan = float("nan")
    wide = torch.full((count, columns + 7), nan, dtype=rows.dtype)
    wide[:, 3 : 3 + columns] = rows
    every_third = torch.full((2 * count + 1, 3 * columns + 1), nan, dtype=rows.dtype)
    every_third[::2][:count, 1::3][:, :columns] = rows
    return {
        "contiguous": rows,
        "transposed": rows.T.contiguous().T,
        "slice": wide[:, 3 : 3 + columns],  # odd addresses, NaN beside every row
        "steps": every_third[::2][:count, 1::3][:, :columns],
        "backwards": wide.flip(0)[:, 3 : 3 + columns].flip(0),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256, 1024])
@pytest.mark.usefixtures("poisoned_memory")
def test_every_instruction_set_is_exact(instruction_set: str, dim: int, dtype: torch.dtype) -> None:
    for columns, count in itertools.product((1, 15, 16, 33, 64, 100, 1023, 1024, 1100, 2500), (1, 5)):
        codes = codes_of(columns, dim)
        rows = integers(count, columns, dtype)
        expected = (rows.double() @ factor_matrix(codes, dim, torch.float64).T).float()
        for name, laid_out in layouts(rows).items():
            sketch = sketch_rows(laid_out, codes, dim)
            assert sketch.dtype == torch.float32
            assert torch.equal(sketch, expected), (columns, count, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.usefixtures("poisoned_memory")
def test_empty_shapes(instruction_set: str, dtype: torch.dtype) -> None:
    for rows, columns in ((0, 0), (0, 100), (5, 0)):
        sketch = sketch_rows(torch.zeros(rows, columns, dtype=dtype), codes_of(columns, 64), 64)
        assert torch.equal(sketch, torch.zeros(rows, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("dim", [16, 64])
def test_every_16_bit_number_arrives(instruction_set: str, dim: int, dtype: torch.dtype) -> None:
    rows = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)[:, None].expand(-1, 2 * dim)
    rows = torch.cat([rows[:, :1], torch.zeros(1 << 16, 2 * dim - 1, dtype=dtype)], 1)
    codes = codes_of(2 * dim, dim, seed=1)
    bucket, sign = (int(~codes[0]), -1) if codes[0] < 0 else (int(codes[0]), 1)
    sketch = sketch_rows(rows, codes, dim)
    # Adding zeros makes a quiet NaN of a signalling one, and +0 of -0.
    assert torch.equal(sketch[:, bucket].nan_to_num(7.0), (sign * rows[:, 0].float()).nan_to_num(7.0))
    sketch[:, bucket] = 0
    assert (sketch == 0).all()


def test_threads_do_not_change_a_bit(instruction_set: str) -> None:
    rows, codes = torch.randn(1111, 700), codes_of(700, 64)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sketch_rows(rows, codes, 64))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_rounding_is_that_of_float32(instruction_set: str) -> None:
    for dtype in DTYPES:
        rows, codes = torch.randn(64, 4096).to(dtype), codes_of(4096, 64)
        expected = rows.double() @ factor_matrix(codes, 64, torch.float64).T
        # 64 numbers of a bucket, one after the other: each partial sum is rounded once.
        bound = 64 * 2**-24 * (rows.double().abs() @ factor_matrix(codes, 64, torch.float64).abs().T)
        assert ((sketch_rows(rows, codes, 64).double() - expected).abs() <= bound).all()


def test_codes_that_are_no_block_permuted_sketch_are_refused(instruction_set: str) -> None:
    rows = torch.ones(3, 100)
    good = codes_of(100, 32)
    for change in (
        {0: 32},
        {5: 1 << 20},
        {7: -33},
        {99: int(good[99]) ^ 1 if good[99] >= 0 else ~(int(~good[99]) ^ 1)},
        {40: -(1 << 31)},
    ):
        codes = good.clone()
        for column, code in change.items():
            codes[column] = code
        with pytest.raises(ValueError, match="projection must send column"):
            sketch_rows(rows, codes, 32)
    for dim in (8, 48, 2048):
        with pytest.raises(ValueError, match=f"power of two from 16 to 1024 rows; got {dim}"):
            sketch_rows(rows, good, dim)
