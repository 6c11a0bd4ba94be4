"""Packing queries and adding up what work items found, run on a CPU, against plain models of both."""

from __future__ import annotations

from itertools import product
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.native.operands import ELEMENTS, aligned_rows, pack

KERNELS = ["mma", "wgmma"]
NAN = float("nan")
LANES = 32


@pytest.fixture(scope="module")
def native(build_module) -> ModuleType:
    return build_module("finish", ["finish.cpp"])


def places_in_tile(layout: tuple[int, int, int, int]) -> np.ndarray:
    """Rows and columns of [warp, register, lane], as the PTX ISA shows them for the sums of m16n8."""
    rows, columns, warp_rows, warp_columns = layout
    group, in_group = np.divmod(np.arange(LANES), 4)
    places = [
        (
            warp_row + block_row + register // 2 * 8 + group,
            warp_column + block_column + in_group * 2 + register % 2,
        )
        for warp_row, warp_column in product(range(0, rows, warp_rows), range(0, columns, warp_columns))
        for block_row, block_column in product(range(0, warp_rows, 16), range(0, warp_columns, 8))
        for register in range(4)
    ]
    warps = rows * columns // (warp_rows * warp_columns)
    return np.array(places).reshape(warps, -1, 2, LANES).transpose(2, 0, 1, 3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_tile_has_every_place_once(native: ModuleType, kernel: str) -> None:
    layout = native.layout(kernel)
    row, column = places_in_tile(layout)
    assert sorted((row * layout[1] + column).flatten()) == list(range(layout[0] * layout[1]))


def packed_by_model(queries: np.ndarray, layout: tuple[int, int, int, int], per_load: int) -> np.ndarray:
    tasks, height, width = queries.shape
    rows, columns = layout[:2]
    row, column = places_in_tile(layout)
    padded = np.zeros((tasks, -(-height // rows) * rows, -(-width // columns) * columns), queries.dtype)
    padded[:, :height, :width] = queries
    warps, registers, lanes = row.shape
    return np.stack(
        [
            padded[task, top + row, left + column]
            .reshape(warps, registers // per_load, per_load, lanes)
            .transpose(0, 1, 3, 2)
            for top in range(0, padded.shape[1], rows)
            for left in range(0, padded.shape[2], columns)
            for task in range(tasks)
        ]
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16], ids=["to-f32", "to-bf16"])
@pytest.mark.parametrize("dtype", ELEMENTS, ids=["f32", "bf16", "f16"])
def test_queries_are_packed_in_the_order_of_registers(
    native: ModuleType, kernel: str, dtype: torch.dtype, to: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(0)
    for tasks, height, width in ((1, 128, 256), (2, 130, 50), (3, 5, 300)):
        # Of a larger tensor, with columns apart.
        queries = torch.randn(tasks, width * 2, height + 1, generator=random).to(dtype).mT[:, 1:, ::2]
        layout = native.layout(kernel)
        per_load = 8 if to == torch.bfloat16 else 4
        right = packed_by_model(queries.to(to).float().numpy(), layout, per_load)
        packed = aligned_rows(1, right.size, to)[0]
        pack(native, kernel, queries, packed, blocks=3)
        assert np.array_equal(packed.float().numpy(), right.ravel())


def test_every_16_bit_query_is_packed_as_it_is(native: ModuleType) -> None:
    for dtype, to in (
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ):
        queries = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, 256, 256)
        packed = aligned_rows(1, 2**16, to)[0]
        pack(native, "mma", queries, packed, blocks=2)
        per_load = 8 if to == torch.bfloat16 else 4
        right = packed_by_model(queries.to(torch.float32).numpy(), native.layout("mma"), per_load)
        assert np.array_equal(packed.float().numpy(), right.ravel(), equal_nan=True)


@given(
    kernel=st.sampled_from(KERNELS),
    height=st.integers(1, 900),
    width=st.integers(1, 2000),
    sizes=st.lists(st.sampled_from([0, 1, 7, 64, 100]), min_size=1, max_size=40),
    tasks=st.integers(0, 5),
    splits=st.integers(1, 5),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
# More tiles than a lane's four sums of every 32nd one take at once.
@example(kernel="mma", height=2560, width=5120, sizes=[7, 100], tasks=2, splits=2, blocks=1, seed=0)
@example(kernel="wgmma", height=2560, width=5120, sizes=[7, 100], tasks=2, splits=2, blocks=1, seed=0)
@settings(max_examples=60, deadline=None)
def test_values_are_sums_over_the_items_that_met_the_domain(
    native: ModuleType,
    kernel: str,
    height: int,
    width: int,
    sizes: list[int],
    tasks: int,
    splits: int,
    blocks: int,
    seed: int,
) -> None:
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    rows, domains = int(offsets[-1]), len(sizes)
    tile_rows, tile_columns = native.layout(kernel)[:2]
    tiles = -(-height // tile_rows) * -(-width // tile_columns)
    partials = torch.full((tasks, domains, splits, tiles), NAN)
    random = torch.Generator().manual_seed(seed)
    row_blocks = -(-rows // native.row_block)
    for split in range(splits):
        begin, end = (min(row_blocks * each // splits * native.row_block, rows) for each in (split, split + 1))
        met = (offsets[:-1].clamp(begin, end) < offsets[1:].clamp(begin, end)).nonzero()[:, 0]
        partials[:, met, split] = torch.randn(tasks, len(met), tiles, generator=random)

    results = []
    for each in (blocks, 4):
        values = torch.full((tasks, domains), NAN, dtype=torch.float64)
        flag = torch.zeros(1, dtype=torch.int32)
        native.finish(
            kernel,
            (rows, height, width, domains, tasks),
            splits,
            offsets.data_ptr(),
            0,
            partials.data_ptr(),
            values.data_ptr(),
            flag.data_ptr(),
            each,
            seed,
        )
        assert int(flag) == 0
        results.append(values)
    torch.testing.assert_close(results[0], partials.double().nansum((2, 3)), rtol=1e-12, atol=1e-12)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("offsets", "order", "bits"),
    [
        pytest.param([0, 4, 10], None, 0, id="right"),
        pytest.param([0, 4, 10], list(range(10)), 0, id="right-order"),
        pytest.param([1, 4, 10], None, 1, id="first"),
        pytest.param([0, 4, 11], None, 1, id="last"),
        pytest.param([0, 4, 3, 10], None, 1, id="decreasing"),
        pytest.param([0, *range(300), 5, 300], None, 1, id="decreasing-far-on"),
        pytest.param([0, 10], [*range(9), 10], 2, id="order-too-large"),
        pytest.param([0, 10], [*range(9), -1], 2, id="order-negative"),
        pytest.param([0, 9], [*range(9), 2**40], 3, id="both"),
        pytest.param([0, 2000], [*range(1999), -1], 2, id="order-last-of-many"),
    ],
)
@pytest.mark.parametrize("tasks", [0, 3])
def test_wrong_offsets_and_order_make_all_values_nan(
    native: ModuleType, offsets: list[int], order: list[int] | None, bits: int, tasks: int
) -> None:
    rows = len(order) if order else 300 if len(offsets) > 100 else 10
    domains = len(offsets) - 1
    for blocks, before in ((1, 4), (3, 0)):
        partials = torch.ones(tasks, domains, 1)
        values = torch.full((tasks, domains), 7.0, dtype=torch.float64)
        flag = torch.full((1,), before, dtype=torch.int32)
        bounds = torch.tensor(offsets)
        places = torch.tensor(order or [0])
        native.finish(
            "mma",
            (rows, 1, 1, domains, tasks),
            1,
            bounds.data_ptr(),
            places.data_ptr() if order else 0,
            partials.data_ptr(),
            values.data_ptr(),
            flag.data_ptr(),
            blocks,
            0,
        )
        assert int(flag) == before | bits
        if bits:
            assert values.isnan().all()
        else:
            assert (values == 1).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["into-f32", "into-bf16"])
@pytest.mark.parametrize(("height", "width"), [(128, 256), (1, 1), (130, 259), (300, 40)])
@pytest.mark.parametrize("splits", [2, 5])
def test_split_totals_are_added_once(
    native: ModuleType, kernel: str, dtype: torch.dtype, height: int, width: int, splits: int
) -> None:
    layout = native.layout(kernel)
    rows, columns = layout[:2]
    down, across = -(-height // rows), -(-width // columns)
    random = torch.Generator().manual_seed(height)
    parts = torch.randn(splits, down * rows, across * columns, generator=random)
    packed = aligned_rows(1, parts.numel(), torch.float32)[0]
    # Four registers of a lane lie together, as float32 queries of as many tasks as splits, but split by split.
    order = [packed_by_model(part[None].numpy(), layout, 4) for part in parts]
    packed.copy_(torch.from_numpy(np.concatenate(order).ravel()))
    before = torch.randn(height, width + 5, generator=random).to(dtype)
    total = before.clone()
    native.total(
        kernel,
        (1, height, width, 1, 1),
        splits,
        packed.data_ptr(),
        total.data_ptr(),
        ELEMENTS[dtype],
        total.stride(0),
        2,
    )
    added = torch.zeros(height, width)
    for part in parts[:, :height, :width]:
        added += part
    assert torch.equal(total[:, width:], before[:, width:])
    assert torch.equal(total[:, :width], (before[:, :width].float() + added).to(dtype))
