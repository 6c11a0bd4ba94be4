"""The projected kernels, run on a CPU, against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.native.operands import ELEMENTS, RandomRows, aligned_rows
from tikmix_fast.ops.common.projection import LayerProjection, factor_matrix

FACTORS = ELEMENTS | {torch.int8: 3, torch.int32: 4}
ROW_BLOCK = 64
SHAPES = [(64, 128), (64, 64), (128, 128), (128, 64), (128, 32)]  # the kernels: dim, rows at once
NAN = float("nan")


@pytest.fixture(scope="module")
def kernel(build_module) -> ModuleType:
    return build_module("projected", ["projected.cpp"])


def write_factor(kernel: ModuleType, factor: Tensor, k: int, dim: int, dtype: torch.dtype) -> Tensor:
    columns = factor.shape[-1]
    matrix = aligned_rows(dim, kernel.matrix_stride(columns), dtype, padding=0)
    kernel.factor(factor.data_ptr(), FACTORS[factor.dtype], k, columns, ELEMENTS[dtype], matrix.data_ptr(), dim, 2)
    return matrix


@dataclass
class Case(RandomRows):
    """One call of a kernel and of what follows it, with random numbers."""

    k_out: int = 64
    k_in: int = 64
    kind: str = "rademacher"
    shape: tuple[int, int] = SHAPES[0]
    blocks: int = 1
    with_gradients: bool = False
    poison: tuple[str, int, float] | None = None  # a side, a sorted row of it and what an element of that becomes

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.poison:
            side, row, value = self.poison
            poisoned = self.input if side == "input" else self.grad_output
            poisoned[row if self.order is None else self.order[row], poisoned.shape[1] // 2] = value
        self.queries = self.normal(self.tasks, self.k_out, self.k_in)
        projection = LayerProjection(
            self.height, self.width, k_out=self.k_out, k_in=self.k_in, kind=self.kind, seed=self.seed
        )
        self.factors = {"output": projection.output_factor, "input": projection.input_factor}
        self.scale = projection.scale

    def run(self, kernel: ModuleType) -> Case:
        dim, rows_at_once = self.shape
        sizes = {"output": self.k_out, "input": self.k_in}
        matrices = {side: write_factor(kernel, self.factors[side], sizes[side], dim, self.dtype) for side in sizes}
        offsets = torch.tensor(self.offsets)
        order = None if self.order is None else self.order.contiguous()
        self.partials = torch.full((self.tasks, self.domains, self.splits), NAN)
        self.values = torch.full((self.tasks, self.domains), -1.0, dtype=torch.float64)
        slots = torch.full((self.domains + self.splits, self.k_out, self.k_in), NAN)
        self.gradients = torch.full((self.domains, self.k_out, self.k_in), -1.0)
        flag = torch.zeros(1, dtype=torch.int32)
        kernel.run(
            {
                "rows": self.rows,
                "height": self.height,
                "width": self.width,
                "tasks": self.tasks,
                "k_out": self.k_out,
                "k_in": self.k_in,
                "element": ELEMENTS[self.dtype],
                "input": self.input.data_ptr(),
                "input_stride": self.input.stride(0),
                "grad_output": self.grad_output.data_ptr(),
                "grad_output_stride": self.grad_output.stride(0),
                "offsets": offsets.data_ptr(),
                "order": 0 if order is None else order.data_ptr(),
                "domains": self.domains,
                "queries": self.queries.data_ptr(),
                "input_matrix": matrices["input"].data_ptr(),
                "output_matrix": matrices["output"].data_ptr(),
                "scale": self.scale,
                "dim": dim,
                "rows_at_once": rows_at_once,
                "splits": self.splits,
                "partials": self.partials.data_ptr(),
                "values": self.values.data_ptr(),
                "slots": slots.data_ptr() if self.with_gradients else 0,
                "gradients": self.gradients.data_ptr(),
                "flag": flag.data_ptr(),
                "blocks": self.blocks,
                "seed": self.seed,
            }
        )
        self.flag = int(flag)
        return self

    def check(self, kernel: ModuleType) -> None:
        """Compare with float64. What is rounded are x and y, to 2**-17, and sums to float32."""
        self.run(kernel)
        assert self.flag == 0
        sorted_rows = slice(None) if self.order is None else self.order
        x, y = (
            rows[sorted_rows].double() @ factor_matrix(self.factors[side], k, torch.float64).T
            for side, rows, k in (("input", self.input, self.k_in), ("output", self.grad_output, self.k_out))
        )
        for domain, (begin, end) in enumerate(pairwise(self.offsets)):
            gradient = self.scale * y[begin:end].T @ x[begin:end]
            error = 2**-16 * self.scale * float(y[begin:end].norm(dim=1) @ x[begin:end].norm(dim=1))
            expected = (self.queries.double() * gradient).sum((1, 2))
            if not gradient.isfinite().all():
                assert self.values[:, domain].isnan().all()
                continue
            norms = self.queries.double().flatten(1).norm(dim=1)
            assert (self.values[:, domain] - expected).abs().le(error * norms).all()
            if self.with_gradients:
                assert (self.gradients[domain] - gradient).norm() <= error
            if begin == end:
                assert (self.values[:, domain] == 0).all()


CASES = {
    "one domain": Case(130, 70, [0, 150]),
    "odd sizes, every split in the middle of a domain": Case(
        71, 133, [0, 3, 3, 100, 260], k_out=16, k_in=33, splits=3, blocks=2, tasks=9, with_gradients=True
    ),
    "one row": Case(64, 8, [0, 1], k_out=1, k_in=64, tasks=1, with_gradients=True),
    "an order": Case(40, 200, [0, 20, 90], with_order=True, kind="countsketch", k_out=16, k_in=32, splits=2),
    "no task": Case(16, 16, [0, 5, 9], tasks=0, with_gradients=True),
    "many small domains": Case(24, 80, [*range(0, 40, 3), 40], tasks=5, kind="gaussian", k_in=17, k_out=48),
    "a wide layer": Case(640, 9, [0, 30], tasks=3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_values_of_64(kernel: ModuleType, case: Case, dtype: torch.dtype) -> None:
    replace(case, dtype=dtype).check(kernel)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_values_of_every_kernel(kernel: ModuleType, shape: tuple[int, int]) -> None:
    """Domains that end in a block of rows, at its end and in the next one, in ranges of one block and of more."""
    k = shape[0]
    case = Case(
        *(72, 140, [0, 5, 64, 150, 240, 240, 250]),
        k_out=k,
        k_in=100 * k // 128,
        shape=shape,
        tasks=6,
        splits=2,
        with_gradients=True,
        with_order=True,
    )
    case.check(kernel)
    replace(case, kind="countsketch", k_out=32, k_in=k, tasks=20, splits=1, seed=1).check(kernel)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_any_layout(kernel: ModuleType, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 300))
    cuts = data.draw(st.lists(st.integers(0, rows), max_size=12).map(sorted))
    Case(
        *(data.draw(st.integers(1, 130)), data.draw(st.integers(1, 130)), [0, *cuts, rows]),
        k_out=data.draw(st.integers(1, 64)),
        k_in=data.draw(st.integers(1, 64)),
        shape=data.draw(st.sampled_from(SHAPES[:2])),
        tasks=data.draw(st.integers(0, 6)),
        splits=data.draw(st.integers(1, -(-rows // ROW_BLOCK))),
        blocks=data.draw(st.integers(1, 3)),
        with_order=data.draw(st.booleans()),
        with_gradients=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 1 << 30)),
    ).check(kernel)


@pytest.mark.parametrize("value", [NAN, float("inf")], ids=str)
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("shape", [(64, 128), (128, 32)], ids=str)
def test_what_is_not_finite_stays_in_its_domain(
    kernel: ModuleType, shape: tuple[int, int], side: str, value: float
) -> None:
    case = Case(20, 90, [0, 30, 31, 100], tasks=3, shape=shape, poison=(side, 30, value), with_order=True)
    case.check(kernel)
    assert case.values.isnan().any(0).tolist() == [False, True, False]


@pytest.mark.parametrize("offsets", [[1, 50, 90], [0, 50, 89], [0, 60, 50, 90], [0, -5, 900, 90], [90, 0]], ids=str)
def test_wrong_offsets_are_told(kernel: ModuleType, offsets: list[int]) -> None:
    case = Case(30, 40, offsets, rows=90, splits=2, with_gradients=True).run(kernel)
    assert case.flag == 1
    assert case.values.isnan().all()
    assert case.gradients.isnan().all()


@pytest.mark.parametrize("entry", [-1, 90])
def test_a_wrong_order_is_told(kernel: ModuleType, entry: int) -> None:
    case = Case(30, 40, [0, 20, 90], with_order=True, with_gradients=True)
    case.order[70] = entry
    case.run(kernel)
    assert case.flag == 2
    assert case.values.isnan().all()
    assert case.gradients.isnan().all()


@pytest.mark.parametrize("shape", [(64, 128), (128, 128)], ids=str)
def test_every_run_gives_the_same_bits(kernel: ModuleType, shape: tuple[int, int]) -> None:
    """Whatever the threads' turns and however many blocks there are."""
    case = Case(80, 100, [0, 90, 200], splits=3, tasks=5, shape=shape, with_gradients=True).run(kernel)
    for blocks in (2, 3, 3):
        other = replace(case, blocks=blocks)
        other.seed = blocks + 10  # of the turns only: the numbers are drawn
        other.run(kernel)
        assert torch.equal(other.values, case.values)
        assert torch.equal(other.gradients, case.gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize(
    "kind", ["countsketch", "rademacher", "gaussian", torch.float32, torch.bfloat16, torch.float16]
)
def test_factors_are_written_out(kernel: ModuleType, kind: str | torch.dtype, dtype: torch.dtype) -> None:
    if isinstance(kind, str):
        factor = LayerProjection(height=1, width=45, k_in=32, kind=kind).input_factor
    else:
        factor = torch.randn(32, 45, generator=torch.Generator().manual_seed(1)).to(kind)
    matrix = write_factor(kernel, factor, 32, 64, dtype)
    assert torch.equal(matrix[:32, :45], factor_matrix(factor, 32, torch.float32).to(dtype))
    assert (matrix[32:] == 0).all()
    assert (matrix[:, 45:] == 0).all()


def test_a_code_of_no_row_is_seen(kernel: ModuleType) -> None:
    factor = torch.tensor([3, ~3, 16, ~16, 15], dtype=torch.int32)
    matrix = write_factor(kernel, factor, 16, 64, torch.bfloat16)
    assert matrix[:16].isnan().all(0).tolist() == [False, False, True, True, False, False, False, False]
    assert matrix[3, :2].tolist() == [1, -1]


@given(
    rows=st.integers(1, 1 << 40),
    k=st.integers(1, 128),
    multiprocessors=st.integers(1, 200),
    shared=st.sampled_from([99, 163, 227]),
)
def test_plan(kernel: ModuleType, rows: int, k: int, multiprocessors: int, shared: int) -> None:
    dim, rows_at_once, splits = kernel.plan(rows, 1, k, multiprocessors, shared * 1024)
    assert dim == (64 if k <= 64 else 128)
    assert (dim, rows_at_once) in SHAPES
    assert 1 <= splits <= min(multiprocessors, -(-rows // ROW_BLOCK))
    for split in {0, splits // 2, splits - 1}:
        begin, end = kernel.rows_of_split(rows, splits, split)
        assert begin < end
        for row in (begin, end - 1):
            assert kernel.split_of_row(rows, splits, row) == split


def test_plan_of_known_devices(kernel: ModuleType) -> None:
    assert kernel.plan(16384, 64, 64, 132, 227 * 1024) == (64, 128, 128)
    assert kernel.plan(1 << 20, 64, 128, 132, 227 * 1024) == (128, 128, 132)
    assert kernel.plan(16384, 64, 64, 84, 99 * 1024) == (64, 64, 84)
    assert kernel.plan(100, 129, 16, 132, 227 * 1024)[0] == 0


def test_eight_rows_meet_eight_groups_of_banks(kernel: ModuleType) -> None:
    assert kernel.conflicts() == (1, 1)
