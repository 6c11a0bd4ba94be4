"""The numbers of group_influence against an independent float64 computation, on every backend."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tests.kernels import check_group_influence
from tikmix_fast import ops
from tikmix_fast.ops.backends import cpu
from tikmix_fast.testing import domain_gradients, eager_group_influence, influence_error

DTYPES = [
    pytest.param(torch.float32, id="f32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="f16"),
]
# T, O, I, sizes of the domains, n
LAYERS = [
    pytest.param(1, 33, 65, [1], 1, id="one-row"),
    pytest.param(97, 33, 130, [97], 3, id="one-domain"),
    pytest.param(200, 48, 64, [0, 80, 0, 1, 119, 0], 4, id="empty-domains"),
    pytest.param(401, 67, 129, [1, 2, 197, 201], 5, id="odd"),
    pytest.param(640, 50, 40, [10] * 64, 64, id="64x64"),
    pytest.param(700, 210, 300, [193, 7, 500], 2, id="many-tiles"),
]


class Case:
    """The arguments of one call, with its right results in float64."""

    def __init__(self, rows: int, height: int, width: int, sizes: list[int], tasks: int, dtype: torch.dtype) -> None:
        assert sum(sizes) == rows
        generator = torch.Generator().manual_seed(rows * 1000 + height + width)
        self.input = torch.randn(rows, width, generator=generator).to(dtype)
        self.grad_output = torch.randn(rows, height, generator=generator).to(dtype)
        self.queries = torch.randn(tasks, height, width, generator=generator).to(dtype)
        self.offsets = torch.tensor([0, *sizes]).cumsum(0)
        self.gradients = domain_gradients(self.input, self.grad_output, self.offsets)
        self.values = torch.einsum("noi,moi->nm", self.queries.double(), self.gradients)
        self.total = self.gradients.sum(0)

    def check(self, values: Tensor, grad_weight: Tensor | None = None, before: Tensor | None = None) -> None:
        call = (self.input, self.grad_output, self.offsets, self.queries)
        check_group_influence(*call, values=values, grad_weight=grad_weight, before=before)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "height", "width", "sizes", "tasks"), LAYERS)
@pytest.mark.parametrize(
    "grad_weight_dtype", [None, torch.float32, torch.bfloat16], ids=["none", "into-f32", "into-bf16"]
)
def test_values_and_total_stay_within_the_error_budget(
    backend: str,
    dtype: torch.dtype,
    rows: int,
    height: int,
    width: int,
    sizes: list[int],
    tasks: int,
    grad_weight_dtype: torch.dtype | None,
    request: pytest.FixtureRequest,
) -> None:
    if backend == "triton" and tasks > 16 and not request.config.getoption("--full"):
        pytest.skip("slow in Triton's interpreter: run with --full")
    case = Case(rows, height, width, sizes, tasks, dtype)
    before = grad_weight = None
    if grad_weight_dtype is not None:
        before = torch.linspace(-3, 5, height * width).view(height, width).to(grad_weight_dtype)
        grad_weight = before.clone()

    values = ops.group_influence(
        case.input, case.grad_output, case.offsets, case.queries, grad_weight=grad_weight, backend=backend
    )

    assert values.dtype == torch.float64
    assert values.shape == (tasks, len(sizes))
    assert (values[:, torch.tensor(sizes) == 0] == 0).all()
    case.check(values, grad_weight, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "height", "width", "sizes", "tasks"), LAYERS)
def test_every_instruction_set_stays_within_the_error_budget(
    instruction_set: str, dtype: torch.dtype, rows: int, height: int, width: int, sizes: list[int], tasks: int
) -> None:
    case = Case(rows, height, width, sizes, tasks, dtype)
    before = torch.ones(height, width)
    grad_weight = before.clone()
    values = ops.group_influence(
        case.input, case.grad_output, case.offsets, case.queries, grad_weight=grad_weight, backend="cpu"
    )
    case.check(values, grad_weight, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65])
def test_every_tail_of_every_instruction_set(instruction_set: str, width: int, dtype: torch.dtype) -> None:
    for height in (1, 5, 6, 7, 11, 12, 13, 25):
        case = Case(9, height, width, [4, 5], 5, dtype)
        grad_weight = torch.zeros(height, width)
        # The same numbers as float32, so that gradients are not rounded to bfloat16.
        values = ops.group_influence(
            case.input, case.grad_output, case.offsets, case.queries.float(), grad_weight=grad_weight, backend="cpu"
        )
        # The textbook bound for sums in float32 of 9 rows, then of the lanes of a micro-tile.
        products = domain_gradients(case.input.abs(), case.grad_output.abs(), case.offsets)
        bound = 70 * torch.finfo(torch.float32).eps * torch.einsum("noi,moi->nm", case.queries.double().abs(), products)
        assert ((values - case.values).abs() <= bound).all()
        torch.testing.assert_close(grad_weight.double(), case.total, rtol=1e-5, atol=1e-5)

        values = ops.group_influence(case.input, case.grad_output, case.offsets, case.queries, backend="cpu")
        rounding = torch.finfo(torch.bfloat16).eps / 2 if dtype == torch.bfloat16 else 0.0
        sizes = torch.einsum("noi,moi->nm", case.queries.double().abs(), case.gradients.abs())
        assert ((values - case.values).abs() <= bound + rounding * sizes).all()


def test_calls_from_several_threads_do_not_share_memory() -> None:
    cases = [Case(300, 70 + 13 * i, 90, [100, 200], 3, torch.float32) for i in range(4)]

    def call(case: Case) -> Tensor:
        return ops.group_influence(case.input, case.grad_output, case.offsets, case.queries, backend="cpu")

    alone = [call(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            together = list(pool.map(call, cases))
            assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_beyond_one_packed_block(backend: str, dtype: torch.dtype) -> None:
    case = Case(5000, 40, 2100, [901, 3100, 0, 999], 2, dtype)
    before = torch.full((40, 2100), 0.5)
    grad_weight = before.clone()
    values = ops.group_influence(
        case.input, case.grad_output, case.offsets, case.queries, grad_weight=grad_weight, backend=backend
    )
    case.check(values, grad_weight, before)


@pytest.mark.parametrize(
    ("rows", "height", "width", "offsets", "tasks", "shape"),
    [
        pytest.param(0, 3, 4, [0, 0, 0], 2, (2, 2), id="no-rows"),
        pytest.param(0, 3, 4, [0], 2, (2, 0), id="no-domains"),
        pytest.param(5, 3, 4, [0, 5], 0, (0, 1), id="no-tasks"),
        pytest.param(5, 0, 4, [0, 2, 5], 2, (2, 2), id="no-outputs"),
        pytest.param(5, 3, 0, [0, 2, 5], 2, (2, 2), id="no-inputs"),
    ],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_nothing_sums_to_zero(
    backend: str, rows: int, height: int, width: int, offsets: list[int], tasks: int, shape: tuple[int, int]
) -> None:
    input, grad_output = torch.ones(rows, width), torch.ones(rows, height)
    grad_weight = torch.full((height, width), 7.0)
    values = ops.group_influence(
        input,
        grad_output,
        torch.tensor(offsets),
        torch.ones(tasks, height, width),
        grad_weight=grad_weight,
        backend=backend,
    )
    assert values.shape == shape
    assert (values == 0).all()
    torch.testing.assert_close(grad_weight, 7.0 + grad_output.T @ input)


def test_tensors_of_different_dtypes_mix(backend: str) -> None:
    case = Case(60, 20, 30, [25, 35], 3, torch.bfloat16)
    for dtypes in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 1)):
        wide, low = torch.float32, torch.bfloat16
        input, grad_output, queries = (
            tensor.to(low if is_low else wide)
            for tensor, is_low in zip((case.input, case.grad_output, case.queries), dtypes, strict=True)
        )
        values = ops.group_influence(input, grad_output, case.offsets, queries, backend=backend)
        error = influence_error(values, case.values, case.queries, case.gradients)
        assert error.error < 1e-7, str(error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["f16", "f64"])
def test_the_reference_takes_every_floating_dtype(dtype: torch.dtype) -> None:
    case = Case(30, 5, 6, [10, 20], 2, dtype)
    grad_weight = torch.zeros(5, 6, dtype=dtype)
    values = ops.group_influence(
        case.input, case.grad_output, case.offsets, case.queries, grad_weight=grad_weight, backend="reference"
    )
    torch.testing.assert_close(values, case.values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_weight, case.total.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_nan_reaches_its_own_domain_and_the_total_only(backend: str, poison: float, dtype: torch.dtype) -> None:
    case = Case(299, 70, 90, [99, 101, 99], 3, dtype)
    case.input[199, 11] = poison  # the last row of an odd domain
    grad_weight = torch.zeros(70, 90)
    values = ops.group_influence(
        case.input, case.grad_output, case.offsets, case.queries.float(), grad_weight=grad_weight, backend=backend
    )
    assert not values[:, 1].isfinite().any()
    torch.testing.assert_close(values[:, [0, 2]], case.values[:, [0, 2]], rtol=1e-4, atol=1e-3)
    assert not grad_weight[:, 11].isfinite().any()
    assert grad_weight[:, :11].isfinite().all()
    assert grad_weight[:, 12:].isfinite().all()


def test_a_nan_in_one_query_reaches_its_own_task_only(backend: str) -> None:
    case = Case(50, 20, 30, [20, 0, 30], 6, torch.float32)
    case.queries[2, 19, 29] = math.nan
    values = ops.group_influence(case.input, case.grad_output, case.offsets, case.queries, backend=backend)
    assert values[2, [0, 2]].isnan().all()
    assert values[[0, 1, 3, 4, 5]].isfinite().all()


def test_a_small_domain_after_a_huge_one_keeps_its_digits(backend: str) -> None:
    case = Case(400, 40, 50, [200, 200], 2, torch.float32)
    case.input[:200] *= 1e4
    values = ops.group_influence(case.input, case.grad_output, case.offsets, case.queries, backend=backend)
    case.check(values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_does_not_depend_on_the_number_of_threads(instruction_set: str, dtype: torch.dtype) -> None:
    case = Case(3000, 300, 410, [1000, 1, 999, 1000], 3, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            grad_weight = torch.zeros(300, 410)
            values = ops.group_influence(
                case.input, case.grad_output, case.offsets, case.queries, grad_weight=grad_weight, backend="cpu"
            )
            results.append((values, grad_weight))
    finally:
        torch.set_num_threads(before)
    for values, grad_weight in results[1:]:
        assert torch.equal(values, results[0][0])
        assert torch.equal(grad_weight, results[0][1])


def every_number(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("which", [0, 1], ids=["input", "grad_output"])
def test_every_16_bit_number_is_read_exactly(instruction_set: str, dtype: torch.dtype, which: int) -> None:
    arguments = [torch.ones(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)]
    arguments[which] = numbers = every_number(dtype)[None]
    grad_weight = torch.zeros(1, 2**16) if which == 0 else torch.zeros(2**16, 1)
    ops.group_influence(
        *arguments, torch.tensor([0, 1]), torch.ones(1, *grad_weight.shape), grad_weight=grad_weight, backend="cpu"
    )
    right = numbers.float()
    if dtype == torch.bfloat16 and instruction_set == "avx512_bf16":
        # The processor's own product of bfloat16 takes denormals for zeros.
        right = torch.where(right.abs() < torch.finfo(torch.float32).tiny, 0, right)
    assert torch.equal(grad_weight.flatten().nan_to_num(7), right.flatten().nan_to_num(7))
    assert torch.equal(grad_weight.flatten().isnan(), right.flatten().isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_every_16_bit_query_is_read_exactly(instruction_set: str, dtype: torch.dtype) -> None:
    queries = every_number(dtype).view(512, 1, 128)
    queries = torch.where(queries.isfinite(), queries, 0)
    # One domain for each column.
    values = ops.group_influence(torch.eye(128), torch.ones(128, 1), torch.arange(129), queries, backend="cpu")
    assert torch.equal(values, queries.double().view(512, 128))


def test_instruction_sets_are_named_best_first() -> None:
    names = cpu.instruction_sets()
    assert names[-1] == "generic"
    assert names == [name for name in ("avx512_bf16", "avx512", "avx2", "generic") if name in names]


@pytest.mark.parametrize("name", ["sse9", "AVX2"])
def test_an_unknown_instruction_set_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKMIX_FAST_CPU_ISA", name)
    ones = torch.ones(1, 1)
    with pytest.raises(
        ValueError, match=rf"TIKMIX_FAST_CPU_ISA must be one of .*generic on this machine; got '{name}'"
    ):
        ops.group_influence(ones, ones, torch.tensor([0, 1]), torch.ones(1, 1, 1), backend="cpu")


def test_parts_of_a_long_domain_that_cancel(instruction_set: str) -> None:
    """The second half takes back nearly all of the first, and lies in other blocks of packed rows."""
    generator = torch.Generator().manual_seed(0)

    def half(width: int) -> Tensor:
        return torch.randn(4096, width, generator=generator)

    input, grad_output = half(64), half(32)
    input = torch.cat([input, input + 0.05 * half(64)]).bfloat16()
    grad_output = torch.cat([grad_output, -grad_output]).bfloat16()
    queries = torch.randn(16, 32, 64, generator=generator).bfloat16()
    offsets = torch.tensor([0, 8192])
    gradients = domain_gradients(input, grad_output, offsets)
    right = torch.einsum("noi,moi->nm", queries.double(), gradients)
    eager, _ = eager_group_influence(input, grad_output, offsets, queries)
    values = ops.group_influence(input, grad_output, offsets, queries, backend="cpu")
    # Over 16 queries, so that neither is judged by one lucky cell.
    assert (values - right).norm() <= 2 * (eager - right).norm()


@pytest.mark.parametrize("offsets", [torch.arange(65), torch.tensor([0, 64])], ids=["row-wise", "fused"])
def test_a_row_that_order_names_twice_counts_twice(backend: str, offsets: Tensor) -> None:
    """The way that is chosen does not change what the total means."""
    order = torch.randint(0, 64, (64,), generator=torch.Generator().manual_seed(1))
    input, grad_output = torch.randn(64, 20), torch.randn(64, 30)
    grad_weight = torch.zeros(30, 20)
    values = ops.group_influence(
        input, grad_output, offsets, torch.ones(1, 30, 20), order=order, grad_weight=grad_weight, backend=backend
    )
    torch.testing.assert_close(grad_weight, grad_output[order].T @ input[order], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(values.sum(), grad_weight.double().sum(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("sizes", [[1] * 64, [30, 34]], ids=["row-wise", "fused"])
def test_autocast_changes_nothing(backend: str, sizes: list[int]) -> None:
    case = Case(64, 96, 128, sizes, 2, torch.float32)
    values = ops.group_influence(case.input, case.grad_output, case.offsets, case.queries, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        again = ops.group_influence(case.input, case.grad_output, case.offsets, case.queries, backend=backend)
    assert torch.equal(values, again)
