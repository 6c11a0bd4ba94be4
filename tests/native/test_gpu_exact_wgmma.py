"""The exact kernel for sm_90a, run on a CPU, against float64; its addresses against plain models."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.native.operands import ELEMENTS, RandomRows, aligned_rows

TILE = (128, 256)
ROW_BLOCK = 64


@pytest.fixture(scope="module")
def kernel(build_module) -> ModuleType:
    return build_module("exact_wgmma", ["exact_wgmma.cpp"])


@dataclass
class Case(RandomRows):
    """One call of the kernel, with random numbers."""

    query_dtype: torch.dtype = torch.bfloat16
    total_dtype: torch.dtype | None = torch.float32
    cluster: int = 1
    clusters: int = 2
    schedule: int = 0  # of the simulator
    poison: tuple[int, float] | None = None  # a sorted row, and what its first element of the input becomes
    first_row: int = 0  # rows before it exist for the kernel alone; no domain has them

    def __post_init__(self) -> None:
        super().__post_init__()
        self.clean_input = self.input.clone()
        if self.poison is not None:
            row, value = self.poison
            self.input[row if self.order is None else self.order[row], 0] = value
        self.queries = self.normal(self.tasks, self.height, self.width).to(self.query_dtype)
        self.before = self.normal(self.height, self.width).to(self.total_dtype or torch.float32)

    @property
    def tiles(self) -> int:
        return -(-self.height // TILE[0]) * -(-self.width // TILE[1])

    def rows_of_split(self, split: int) -> tuple[int, int]:
        blocks = -(-self.rows // ROW_BLOCK)
        begin, end = (min(blocks * s // self.splits * ROW_BLOCK, self.rows) for s in (split, split + 1))
        return begin, end

    def matrix(self, rows: torch.Tensor) -> list[int]:
        stride = rows.stride(0)
        return [rows.data_ptr() - self.first_row * stride * rows.element_size(), stride]

    def run(self, kernel: ModuleType) -> None:
        items = self.tiles * self.splits
        per_tile = TILE[0] * TILE[1]
        packed = aligned_rows(1, max(self.tasks, 1) * self.tiles * per_tile, self.query_dtype)
        pack = kernel.pack_bfloat16 if self.query_dtype == torch.bfloat16 else kernel.pack_float32
        pack(self.tasks, self.height, self.width, self.queries.data_ptr(), packed.data_ptr())
        offsets = torch.tensor(self.offsets) + self.first_row
        self.partials = torch.full((self.tasks, self.domains, items), float("nan"))
        split_totals = torch.full((items, per_tile), float("nan"))
        total = self.before.clone() if self.total_dtype else None
        kernel.exact(
            [self.first_row + self.rows, self.height, self.width, self.tasks, self.domains, self.splits],
            ELEMENTS[self.dtype],
            self.matrix(self.input),
            self.matrix(self.grad_output),
            offsets.data_ptr(),
            0 if self.order is None else self.order.data_ptr(),
            ELEMENTS[self.query_dtype],
            packed.data_ptr(),
            0 if total is None else total.data_ptr(),
            ELEMENTS[self.total_dtype or torch.float32],
            self.width,
            self.partials.data_ptr(),
            split_totals.data_ptr(),
            self.cluster,
            self.clusters,
            self.schedule,
        )
        if total is not None and self.splits > 1:
            assert torch.equal(total, self.before)
            added = total.float()
            kernel.add_split_totals(self.height, self.width, self.splits, split_totals.data_ptr(), added.data_ptr())
            total = added.to(self.total_dtype)
        self.total = total

    def values(self) -> torch.Tensor:
        """Sums over the items that met each domain; what others have was not written."""
        values = torch.zeros(self.tasks, self.domains, dtype=torch.float64)
        partials = self.partials.double().view(self.tasks, self.domains, self.splits, self.tiles)
        for split in range(self.splits):
            begin, end = self.rows_of_split(split)
            for domain in range(self.domains):
                if max(begin, self.offsets[domain]) < min(end, self.offsets[domain + 1]):
                    values[:, domain] += partials[:, domain, split].sum(-1)
                else:
                    assert partials[:, domain, split].isnan().all()
        return values

    def check(self, kernel: ModuleType) -> None:
        """Compare with float64. What float32 may round away grows with what it adds up, signs aside."""
        self.run(kernel)
        rows = slice(None) if self.order is None else self.order
        grad_output, inputs = self.grad_output[rows].double(), self.clean_input[rows].double()
        queries = self.queries.double()
        added = grad_output.abs().T @ inputs.abs()
        values = self.values()
        for domain, (begin, end) in enumerate(pairwise(self.offsets)):
            if self.poison is not None and begin <= self.poison[0] < end:
                assert not values[:, domain].isfinite().any()
                continue
            grad = grad_output[begin:end].T @ inputs[begin:end]
            size = added if self.total_dtype else grad_output[begin:end].abs().T @ inputs[begin:end].abs()
            error = (values[:, domain] - (queries * grad).sum((1, 2))).abs()
            assert (error <= 2e-6 * (queries.abs() * size).sum((1, 2))).all()
        if self.total is not None:
            # A total of bfloat16 is rounded when a tile is handed on; at most once for each domain and split.
            digits = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8 * (self.domains + 1)}[self.total.dtype]
            error = (self.total.double() - (self.before.double() + grad_output.T @ inputs)).abs()
            wrong = error > digits * (self.before.double().abs() + added)
            if self.poison is not None:
                assert not self.total[:, 0].isfinite().any()
                wrong[:, 0] = False
            assert not wrong.any()


def offsets_of(lengths: list[int]) -> list[int]:
    return [0, *np.cumsum(lengths).tolist()]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.sampled_from([0, 0, 1, 5, 63, 64, 65, 128, 130]), min_size=1, max_size=5))
    sizes = [8, 40, 64, 72, 128, 129, 136, 250, 256]
    return Case(
        height=draw(st.sampled_from([*sizes, 260, 390])),
        width=draw(st.sampled_from([*sizes, 257, 320, 520])),
        offsets=offsets_of(lengths),
        tasks=draw(st.sampled_from([0, 1, 2, 3])),
        splits=draw(st.integers(1, 4)),
        with_order=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])),
        query_dtype=draw(st.sampled_from([torch.bfloat16, torch.float32])),
        total_dtype=draw(st.sampled_from([None, torch.float32, torch.bfloat16])),
        cluster=draw(st.sampled_from([1, 2])),
        clusters=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**32)),
        schedule=draw(st.integers(0, 2**32)),
    )


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_values_and_total_of_random_layouts(kernel: ModuleType, case: Case) -> None:
    case.check(kernel)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("tasks", [0, 1, 9, 20, 1030])
@pytest.mark.parametrize("total_dtype", [None, torch.float32], ids=["values", "total"])
def test_any_number_of_tasks(kernel: ModuleType, cluster: int, tasks: int, total_dtype: torch.dtype | None) -> None:
    Case(8, 16, [0, 70, 70, 200], tasks=tasks, total_dtype=total_dtype, cluster=cluster).check(kernel)


@pytest.mark.parametrize("cluster", [1, 2])
def test_few_clusters_take_many_items_through_one_ring(kernel: ModuleType, cluster: int) -> None:
    Case(5 * 128, 520, [0, 64, 65, 193, 300], splits=3, cluster=cluster, clusters=1).check(kernel)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("with_order", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [3, 66], ids=["by map", "in the last rows"])
@pytest.mark.parametrize("splits", [1, 2])
def test_a_number_that_is_not_finite_reaches_its_domain_and_the_total(
    kernel: ModuleType, cluster: int, with_order: bool, value: float, row: int, splits: int
) -> None:
    case = Case(
        100, 300, [0, 67, 150, 150, 230], poison=(row, value), cluster=cluster, with_order=with_order, splits=splits
    )
    case.check(kernel)


@pytest.mark.parametrize("cluster", [1, 2])
def test_few_rows_after_many_keep_their_digits(kernel: ModuleType, cluster: int) -> None:
    case = Case(16, 24, [0, 2000, 2001], cluster=cluster)
    case.check(kernel)
    grad = case.grad_output[2000].double().outer(case.input[2000].double())
    expected = (case.queries.double() * grad).sum((1, 2))
    size = (case.queries.double() * grad).abs().sum((1, 2))
    assert ((case.values()[:, 1] - expected).abs() <= 2e-6 * size).all()


@pytest.mark.parametrize("cluster", [1, 2])
def test_rows_that_a_tensor_map_cannot_count(kernel: ModuleType, cluster: int) -> None:
    Case(40, 72, [0, 90, 300], first_row=2**31 - 150, cluster=cluster).check(kernel)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "offsets", [[0, 90, 30, 200], [-7, 50, 120, 200], [0, 64, 10**15, 200], [-(2**62), 2**62, -5, 2**62], [9, 9, 9, 9]]
)
def test_wrong_offsets_read_no_foreign_memory(
    kernel: ModuleType, offsets: list[int], splits: int, cluster: int
) -> None:
    case = Case(100, 72, [0, 64, 128, 200], splits=splits, cluster=cluster)
    case.offsets = offsets
    case.run(kernel)
    assert case.total.isfinite().all()


@pytest.mark.parametrize("cluster", [1, 2])
def test_wrong_order_reads_no_foreign_memory(kernel: ModuleType, cluster: int) -> None:
    case = Case(100, 72, [0, 64, 130], with_order=True, cluster=cluster)
    case.order[::7] = 10**12
    case.order[1::7] = -1
    case.run(kernel)
    assert case.total.isfinite().all()


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("with_order", [False, True])
def test_every_schedule_gives_the_same_bits(kernel: ModuleType, cluster: int, with_order: bool) -> None:
    found = []
    for schedule in range(4):
        case = Case(264, 300, [0, 100, 164, 260], splits=2, with_order=with_order, cluster=cluster)
        case.schedule = schedule
        case.clusters = 1 + schedule % 3
        case.run(kernel)
        found.append((case.partials, case.total))
    for partials, total in found[1:]:
        assert torch.equal(partials.view(torch.int32), found[0][0].view(torch.int32))
        assert torch.equal(total, found[0][1])


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(0, 1000),
    height=st.integers(1, 6000),
    width=st.integers(1, 3000),
    splits=st.integers(1, 5),
    cluster=st.sampled_from([1, 2]),
)
def test_items_cover_every_tile_of_every_split_once(
    kernel: ModuleType, rows: int, height: int, width: int, splits: int, cluster: int
) -> None:
    tile_rows, tile_columns = -(-height // TILE[0]), -(-width // TILE[1])
    items = kernel.items(rows, height, width, splits, cluster)
    real = [item for item in items if item[2] < tile_rows]
    assert len(items) - len(real) == (tile_columns * splits if cluster == 2 and tile_rows % 2 else 0)
    assert sorted(item[1:4] for item in real) == sorted(
        [split, row, column] for split in range(splits) for row in range(tile_rows) for column in range(tile_columns)
    )
    assert sorted(item[0] for item in real) == list(range(tile_rows * tile_columns * splits))
    for first, second in zip(items[::2], items[1::2], strict=False):
        if cluster == 2:
            assert second[1:2] + second[3:] == first[1:2] + first[3:]
            assert second[2] == first[2] + 1
    for number, split, *_ in real:
        assert number // (tile_rows * tile_columns) == split


def test_swizzle_exchanges_chunks_of_a_row(kernel: ModuleType) -> None:
    assert sorted(kernel.swizzle128(offset) for offset in range(8192)) == list(range(8192))
    for row in range(64):
        for chunk in range(8):
            place = kernel.place_in_box(row, chunk)
            assert place == row * 128 + (chunk ^ row % 8) * 16
            for byte in range(16):
                assert kernel.swizzle128(row * 128 + chunk * 16 + byte) == place + byte


def test_descriptor_has_the_fields_of_the_ptx_isa(kernel: ModuleType) -> None:
    for start in range(0, 2**18, 2048):
        descriptor = kernel.matrix_descriptor(start)
        assert descriptor & 0x3FFF == start // 16
        assert descriptor >> 16 & 0x3FFF == 64 * 64 * 2 // 16  # to the next 64 columns: a box
        assert descriptor >> 32 & 0x3FFF == 8 * 64 * 2 // 16  # to the next 8 rows
        assert descriptor >> 62 == 1  # 128-byte swizzle
        assert descriptor & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 1 << 62) == 0


@settings(max_examples=40, deadline=None)
@given(
    row=st.integers(0, 140),
    column=st.integers(0, 30).map(lambda n: n * 8),
    boxes=st.sampled_from([1, 2, 4]),
    first_row=st.sampled_from([0, 16, 32, 48]),
    seed=st.integers(0, 1000),
)
def test_a_descriptor_finds_what_a_map_copied(
    kernel: ModuleType, row: int, column: int, boxes: int, first_row: int, seed: int
) -> None:
    matrix = torch.zeros(256, 600, dtype=torch.int16)
    inside = matrix[:100, :201]
    inside.copy_(torch.arange(1, 1 + inside.numel(), dtype=torch.int16).view(inside.shape))
    memory = aligned_rows(100, 201, torch.bfloat16)
    memory.view(torch.int16).copy_(inside)
    found = kernel.box_by_descriptor(
        [memory.data_ptr(), memory.stride(0)], *inside.shape, row, column, boxes, first_row, seed
    )
    expected = matrix[row + first_row : row + first_row + 16, column : column + boxes * 64]
    assert found == (expected.flatten().int() & 0xFFFF).tolist()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("none", None),
        ("no fence after copies", "products read what a thread copied without fence_async_proxy"),
        ("no products_begin", "products without products_begin before them"),
        ("accumulators touched", "accumulators were touched while products were under way"),
        ("products not committed", "waits for products that were not committed"),
        ("leaves early", "which has left the kernel"),
        ("barrier not shown", "has not shown to the cluster"),
        ("too few arrivals", "no thread can go on"),
        ("bytes do not come", "no thread can go on"),
    ],
)
def test_the_simulator_tells_a_kernel_that_is_wrong(kernel: ModuleType, mistake: str, message: str | None) -> None:
    for seed in range(8):
        if message is None:
            assert kernel.small_kernel(mistake, seed) == [64.0] * 128
        else:
            with pytest.raises(RuntimeError, match=message):
                kernel.small_kernel(mistake, seed)
