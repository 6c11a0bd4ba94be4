"""The exact kernel for sm_80 and what follows it, run on a CPU, against float64; its shared memory, bank by bank."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels import check_group_influence
from tests.native.operands import ELEMENTS, RandomRows, aligned_rows, pack
from tikmix_fast.testing import domain_gradients

TILE = 128
NAN = float("nan")


@dataclass
class Native:
    """The kernel, and the packing of queries that test_gpu_finish.py tests."""

    kernel: ModuleType
    finish: ModuleType


@pytest.fixture(scope="module")
def native(build_module) -> Native:
    return Native(build_module("exact_mma", ["exact_mma.cpp"]), build_module("finish", ["finish.cpp"]))


@dataclass
class Case(RandomRows):
    """One call, with random numbers."""

    query_dtype: torch.dtype = torch.bfloat16
    total_dtype: torch.dtype | None = torch.float32
    blocks: int = 2
    stages: int = 4
    wrong_order: dict[int, int] = field(default_factory=dict)  # entries of order that are replaced

    def __post_init__(self) -> None:
        super().__post_init__()
        self.queries = self.normal(self.tasks, self.height, self.width).to(self.query_dtype)
        # Rows of the total have other numbers between them, which stay.
        before = self.normal(self.height, self.width + 3)
        self.before = before.to(self.total_dtype or torch.float32)

    def sorted(self, rows: Tensor) -> Tensor:
        return rows if self.order is None else rows[self.order]

    def run(self, native: Native) -> None:
        tiles = -(-self.height // TILE) * -(-self.width // TILE)
        packed = aligned_rows(1, max(1, tiles * self.tasks * TILE * TILE), self.query_dtype)
        pack(native.finish, "mma", self.queries, packed, blocks=2)
        offsets = torch.tensor(self.offsets)
        order = None if self.order is None else self.order.clone()
        for row, place in self.wrong_order.items():
            order[row] = place
        partials = torch.full((self.tasks, self.domains, self.splits * tiles), NAN)
        split_totals = aligned_rows(1, self.splits * tiles * TILE * TILE, torch.float32)
        self.values = torch.full((self.tasks, self.domains), 123.0, dtype=torch.float64)
        self.total = self.before.clone()
        flag = torch.zeros(1, dtype=torch.int32)
        native.kernel.run(
            {
                "rows": self.rows,
                "height": self.height,
                "width": self.width,
                "tasks": self.tasks,
                "element": ELEMENTS[self.dtype],
                "input": self.input.data_ptr(),
                "input_stride": self.input.stride(0),
                "grad_output": self.grad_output.data_ptr(),
                "grad_output_stride": self.grad_output.stride(0),
                "domains": self.domains,
                "offsets": offsets.data_ptr(),
                "order": 0 if order is None else order.data_ptr(),
                "query_element": ELEMENTS[self.query_dtype],
                "queries": packed.data_ptr(),
                "query_bytes": packed.numel() * packed.element_size(),
                "grad_weight": self.total.data_ptr() if self.total_dtype else 0,
                "grad_weight_element": ELEMENTS[self.total_dtype or torch.float32],
                "grad_weight_stride": self.total.stride(0),
                "splits": self.splits,
                "partials": partials.data_ptr(),
                "split_totals": split_totals.data_ptr(),
                "values": self.values.data_ptr(),
                "flag": flag.data_ptr(),
                "stages": self.stages,
                "blocks": self.blocks,
                "seed": self.seed,
            }
        )
        self.flag = int(flag)

    def check(self, native: Native) -> None:
        """Compare with float64. What float32 may round away grows with what it adds up, signs aside."""
        self.run(native)
        assert self.flag == 0
        grad_output, input = self.sorted(self.grad_output), self.sorted(self.input)
        offsets = torch.tensor(self.offsets)
        gradients = domain_gradients(input, grad_output, offsets)
        sizes = domain_gradients(input.abs(), grad_output.abs(), offsets)
        # Rows, then registers of a lane, lanes, warps, and the two prefixes of a difference.
        unit = (self.rows + 64) * 2.0**-24
        kept = sizes.sum(0).expand_as(sizes) if self.total_dtype else sizes
        right = torch.einsum("noi,moi->nm", self.queries.double(), gradients)
        bound = unit * torch.einsum("noi,moi->nm", self.queries.double().abs(), kept)
        assert ((self.values - right).abs() <= bound).all()
        assert (self.values[:, offsets.diff() == 0] == 0).all()
        if self.total_dtype is None:
            return
        before, total = self.before.double(), self.total.double()
        assert torch.equal(total[:, self.width :], before[:, self.width :])
        right = before[:, : self.width] + gradients.sum(0)
        bound = unit * (sizes.sum(0) + right.abs())
        if self.total_dtype == torch.bfloat16:
            bound += 2.0**-8 * self.roundings() * (before[:, : self.width].abs() + sizes.sum(0))
        assert ((total[:, : self.width] - right).abs() <= bound).all()

    def roundings(self) -> int:
        """Return how often a bfloat16 total may be rounded: at the end, and before every domain of few rows."""
        sizes = np.diff(self.offsets)
        return 1 + sum(size * 1024 < self.rows for size in sizes if size)


def test_no_bank_is_waited_for(native: Native) -> None:
    assert native.kernel.conflicts_of_copies() == 1
    assert native.kernel.conflicts_of_fragments(True) == 1
    assert native.kernel.conflicts_of_fragments(False) == 1


def test_every_chunk_has_its_place(native: Native) -> None:
    assert native.kernel.chunks_are_places()


def test_two_blocks_share_a_multiprocessor(native: Native) -> None:
    """99 KiB on sm_86, 89 and 120, 163 on sm_80, 1 KiB reserved for each block."""
    assert 2 * (native.kernel.shared_bytes(3, 64) + 1024) <= 100 * 1024
    assert 2 * (native.kernel.shared_bytes(4, 1024) + 1024) <= 164 * 1024


@pytest.mark.parametrize("total_dtype", [None, torch.float32, torch.bfloat16], ids=["none", "into-f32", "into-bf16"])
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16], ids=["f32-queries", "bf16-queries"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_every_instantiation(
    native: Native, dtype: torch.dtype, query_dtype: torch.dtype, total_dtype: torch.dtype | None
) -> None:
    for stages, with_order in ((3, True), (4, False)):
        Case(
            136, 72, [0, 50, 50, 83, 150], 3,
            dtype=dtype, query_dtype=query_dtype, total_dtype=total_dtype, stages=stages, with_order=with_order,
        ).check(native)  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(8, 8, [0, 1]), id="one-row"),
        pytest.param(Case(1, 1, [0, 3, 5], blocks=5), id="one-weight"),
        pytest.param(Case(5, 300, [0, 7, 40], 1), id="odd-and-wide"),
        pytest.param(Case(261, 3, [0, 33], 1, splits=2), id="odd-and-tall"),
        pytest.param(Case(128, 128, [0, 64, 128]), id="whole-blocks"),
        pytest.param(Case(130, 130, [0, 0, 0, 40, 40, 41, 41], blocks=1), id="empty-domains"),
        pytest.param(Case(24, 24, [0, 31, 63, 95], 0), id="no-tasks"),
        pytest.param(Case(24, 24, [0, 31, 63, 95], 0, splits=2), id="no-tasks-split"),
        pytest.param(Case(120, 120, [0, 31, 63, 95], 40), id="more-tasks-than-a-group"),
        pytest.param(Case(24, 24, [0, 20, 30, 34], 1030, query_dtype=torch.bfloat16), id="more-tasks-than-sums-kept"),
        pytest.param(Case(24, 24, [0, 20, 30], 1030, total_dtype=None), id="more-tasks-than-sums-kept-no-total"),
        pytest.param(Case(40, 200, [0, *range(65, 90)], 9), id="domains-of-one-row"),
        pytest.param(Case(40, 40, [0, 2100, 2101, 2102, 2200], 3), id="tiny-after-long"),
        pytest.param(
            Case(40, 40, [0, 2100, 2101, 2102, 2200], 3, total_dtype=torch.bfloat16), id="tiny-after-long-bf16"
        ),
        pytest.param(Case(100, 20, [0, 10, 10], splits=4, blocks=7), id="splits-without-rows"),
        pytest.param(Case(300, 260, [0, 30, 70], 9, blocks=2), id="many-items-few-blocks"),
        pytest.param(Case(140, 130, [0, 100, 200, 300], 9, splits=3, with_order=True), id="splits-cut-domains"),
        pytest.param(Case(40, 40, [0, 2100, 2101, 2200], 3, splits=4, blocks=3), id="splits-flush-twice"),
        pytest.param(Case(16, 16, [0], 2, rows=0), id="no-domains"),
    ],
)
def test_odd_cases(native: Native, case: Case) -> None:
    case.check(native)


@given(
    height=st.integers(1, 20).map(lambda eighths: 8 * eighths) | st.integers(1, 150),
    width=st.integers(1, 20).map(lambda eighths: 8 * eighths) | st.integers(1, 150),
    sizes=st.lists(st.sampled_from([0, 1, 5, 16, 31, 32, 33, 64, 70]), min_size=1, max_size=6),
    tasks=st.sampled_from([0, 1, 2, 9]),
    splits=st.integers(1, 4),
    with_order=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    query_dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    total_dtype=st.sampled_from([None, torch.float32, torch.bfloat16]),
    blocks=st.integers(1, 5),
    stages=st.sampled_from([3, 4]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40, deadline=None)
def test_any_layout(native: Native, sizes: list[int], **arguments: object) -> None:
    offsets = np.cumsum([0, *sizes]).tolist()
    Case(offsets=offsets, **arguments).check(native)


def test_the_bits_do_not_depend_on_who_runs_first(native: Native) -> None:
    case = Case(200, 140, [0, 3, 90, 90, 131], 9, splits=2)
    case.run(native)
    for seed, blocks, stages in ((1, 1, 4), (2, 8, 3), (3, 3, 4), (4, 20, 3)):
        values, total = case.values, case.total
        case.seed, case.blocks, case.stages = seed, blocks, stages
        case.run(native)
        assert torch.equal(case.values, values)
        assert torch.equal(case.total, total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("total_dtype", [None, torch.float32, torch.bfloat16], ids=["none", "into-f32", "into-bf16"])
def test_the_error_budget(native: Native, dtype: torch.dtype, total_dtype: torch.dtype | None) -> None:
    case = Case(210, 300, [0, 193, 200, 700], 2, dtype=dtype, query_dtype=torch.bfloat16, total_dtype=total_dtype)
    case.run(native)
    check_group_influence(
        *(case.input, case.grad_output, torch.tensor(case.offsets), case.queries.to(dtype)),
        values=case.values,
        grad_weight=None if total_dtype is None else case.total[:, : case.width],
        before=case.before[:, : case.width],
    )


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("total_dtype", [None, torch.float32], ids=["none", "into-f32"])
def test_a_nan_reaches_its_own_domain_and_the_total_only(
    native: Native, poison: float, splits: int, total_dtype: torch.dtype | None
) -> None:
    case = Case(140, 150, [0, 99, 200, 299], 3, splits, total_dtype=total_dtype, blocks=3)
    clean = replace(case)
    clean.run(native)
    case.input[199, 11] = poison  # the last row of an odd domain
    case.queries[:, :3] = 0
    clean.queries[:, :3] = 0
    case.run(native)
    clean.run(native)
    assert not case.values[:, 1].isfinite().any()
    torch.testing.assert_close(case.values[:, [0, 2]], clean.values[:, [0, 2]], rtol=1e-4, atol=1e-3)
    if total_dtype is not None:
        assert not case.total[:, 11].isfinite().any()
        right, here = clean.total.clone(), case.total.clone()
        right[:, 11] = here[:, 11] = 0
        torch.testing.assert_close(here, right, rtol=1e-5, atol=1e-3)


def test_a_nan_in_one_query_reaches_its_own_task_only(native: Native) -> None:
    case = Case(50, 60, [0, 20, 20, 50], 6, query_dtype=torch.float32)
    case.queries[2, 19, 29] = NAN
    case.run(native)
    assert case.values[2, [0, 2]].isnan().all()
    others = replace(case)
    others.queries = torch.where(case.queries.isnan(), 0, case.queries)
    others.check(native)
    kept = [0, 1, 3, 4, 5]
    torch.testing.assert_close(case.values[kept], others.values[kept], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(case.total, others.total, rtol=1e-5, atol=1e-5)


def test_a_tiny_domain_after_a_long_one_keeps_its_digits(native: Native) -> None:
    """Beside 4000 larger rows, the products of one row would lose most digits in a difference of sums."""
    case = Case(64, 64, [0, 4000, 4001], 4, query_dtype=torch.float32)
    case.input[:4000] *= 64
    case.run(native)
    gradient = case.grad_output[4000:].double().T @ case.input[4000:].double()
    queries = case.queries.double()
    right = torch.einsum("noi,oi->n", queries, gradient)
    scale = queries.flatten(1).norm(dim=1) * gradient.norm()
    assert ((case.values[:, 1] - right).abs() <= 2.0**-24 * scale).all()


@pytest.mark.parametrize(
    "offsets",
    [
        pytest.param([1, 20, 40], id="starts-late"),
        pytest.param([0, 20, 39], id="ends-early"),
        pytest.param([0, 20, 41], id="ends-late"),
        pytest.param([0, 30, 10, 40], id="decreases"),
        pytest.param([-(2**62), 2**62, -5, 7, 40], id="far-away"),
    ],
)
def test_wrong_offsets_make_nan_and_a_flag(native: Native, offsets: list[int]) -> None:
    for splits in (1, 2):
        case = Case(20, 140, offsets, 3, splits, rows=40)
        case.run(native)
        assert case.flag == 1
        assert case.values.isnan().all()


@pytest.mark.parametrize("place", [-1, 40, 2**62, -(2**62)])
def test_a_wrong_order_makes_nan_and_a_flag(native: Native, place: int) -> None:
    case = Case(20, 140, [0, 10, 40], 3, with_order=True, wrong_order={17: place})
    case.run(native)
    assert case.flag == 2
    assert case.values.isnan().all()
