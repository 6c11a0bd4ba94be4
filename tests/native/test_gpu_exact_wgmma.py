"""The exact kernel for sm_90a, run on a CPU, against float64; its addresses against plain models."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

TILE = (128, 256)
ROW_BLOCK = 64
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@pytest.fixture(scope="module")
def kernel(build_module) -> ModuleType:
    return build_module("exact_wgmma", ["exact_wgmma.cpp"])


def aligned(rows: int, columns: int, dtype: torch.dtype, fill: float = float("nan")) -> torch.Tensor:
    """[rows, columns] of a matrix whose rows begin at multiples of 16 bytes and have `fill` between them."""
    stride = -(-columns // 8) * 8 + 8
    memory = torch.full((rows * stride + 16,), fill, dtype=dtype)
    skip = -memory.data_ptr() % 16 // memory.element_size()
    return memory[skip : skip + rows * stride].view(rows, stride)[:, :columns]


@dataclass
class Case:
    """One call of the kernel, with random numbers."""

    height: int
    width: int
    offsets: list[int]
    tasks: int = 2
    splits: int = 1
    with_order: bool = False
    dtype: torch.dtype = torch.bfloat16
    query_dtype: torch.dtype = torch.bfloat16
    total_dtype: torch.dtype | None = torch.float32
    cluster: int = 1
    clusters: int = 2
    seed: int = 0
    rows: int = -1
    poison: dict[int, float] = field(default_factory=dict)  # a sorted row and what its first element becomes

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)

        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random)

        if self.rows < 0:
            self.rows = self.offsets[-1]
        self.order = torch.randperm(self.rows, generator=random) if self.with_order else None
        self.grad_output = aligned(self.rows, self.height, self.dtype)
        self.grad_output.copy_(numbers(self.rows, self.height))
        self.input = aligned(self.rows, self.width, self.dtype)
        self.input.copy_(numbers(self.rows, self.width))
        for row, value in self.poison.items():
            self.input[row if self.order is None else self.order[row], 0] = value
        self.queries = numbers(self.tasks, self.height, self.width).to(self.query_dtype)
        self.before = numbers(self.height, self.width).to(self.total_dtype or torch.float32)
        self.domains = len(self.offsets) - 1

    @property
    def tiles(self) -> int:
        return -(-self.height // TILE[0]) * -(-self.width // TILE[1])

    def rows_of_split(self, split: int) -> tuple[int, int]:
        blocks = -(-self.rows // ROW_BLOCK)
        return tuple(min(blocks * s // self.splits * ROW_BLOCK, self.rows) for s in (split, split + 1))

    def run(self, kernel: ModuleType) -> None:
        items = self.tiles * self.splits
        per_tile = TILE[0] * TILE[1]
        packed = aligned(1, max(self.tasks, 1) * self.tiles * per_tile, self.query_dtype)
        pack = kernel.pack_bfloat16 if self.query_dtype == torch.bfloat16 else kernel.pack_float32
        pack(self.tasks, self.height, self.width, self.queries.data_ptr(), packed.data_ptr())
        offsets = torch.tensor(self.offsets)
        self.partials = torch.full((self.tasks, self.domains, items), float("nan"))
        split_totals = torch.full((items, per_tile), float("nan"))
        total = self.before.clone() if self.total_dtype else None
        kernel.exact(
            [self.rows, self.height, self.width, self.tasks, self.domains, self.splits],
            ELEMENTS[self.dtype],
            [self.input.data_ptr(), self.input.stride(0)],
            [self.grad_output.data_ptr(), self.grad_output.stride(0)],
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
            self.seed,
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

    def sorted_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = slice(None) if self.order is None else self.order
        return self.grad_output[rows].double(), self.input[rows].double()

    def check(self, kernel: ModuleType) -> None:
        """Compare with float64. What float32 may round away grows with what it adds up, signs aside."""
        self.run(kernel)
        grad_output, inputs = self.sorted_rows()
        queries = self.queries.double()
        added = grad_output.abs().T @ inputs.abs()
        kept = added if self.total_dtype else None
        values = self.values()
        for domain, (begin, end) in enumerate(zip(self.offsets[:-1], self.offsets[1:], strict=True)):
            grad = grad_output[begin:end].T @ inputs[begin:end]
            size = grad_output[begin:end].abs().T @ inputs[begin:end].abs() if kept is None else kept
            error = (values[:, domain] - (queries * grad).sum((1, 2))).abs()
            assert (error <= 2e-6 * (queries.abs() * size).sum((1, 2))).all()
        if self.total is not None:
            digits = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}[self.total.dtype]
            flushes = 1 + (self.domains if self.total.dtype == torch.bfloat16 else 0)
            error = (self.total.double() - (self.before.double() + grad_output.T @ inputs)).abs()
            assert (error <= digits * flushes * (self.before.double().abs() + added)).all()


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
    )


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_values_and_total_of_random_layouts(kernel: ModuleType, case: Case) -> None:
    case.check(kernel)
