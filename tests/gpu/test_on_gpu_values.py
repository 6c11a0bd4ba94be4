"""The numbers of group_influence on a GPU against float64, over shapes, dtypes and layouts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.layouts import every_other_column, every_third_row, transposed, unaligned
from tikmix_fast import ops

pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic")

# O, I, sizes of the domains, n
LAYERS = [
    pytest.param(40, 64, [1], 1, id="one-row"),
    pytest.param(128, 128, [64], 1, id="one-tile"),
    pytest.param(40, 136, [97], 3, id="one-domain"),
    pytest.param(48, 64, [0, 80, 0, 1, 119, 0], 4, id="empty-domains"),
    pytest.param(72, 136, [1, 2, 197, 201], 5, id="multiples-of-8"),
    pytest.param(128, 256, [128, 64, 192], 9, id="whole-blocks"),
    pytest.param(56, 40, [10] * 64, 20, id="64-domains"),
    pytest.param(64, 64, [1] * 200, 2, id="a-row-each"),
    pytest.param(520, 392, [193, 7, 500], 2, id="many-tiles"),
    pytest.param(136, 264, [901, 3100, 0, 999], 9, id="many-rows"),
    pytest.param(768, 768, [700, 11, 1313, 24], 16, id="a-layer"),
    pytest.param(64, 72, [30, 41], 64, id="64-tasks"),
]
# Rows of no multiple of 16 bytes; the native kernels leave them to others.
ODD_LAYERS = [
    pytest.param(33, 65, [1], 1, id="odd-one-row"),
    pytest.param(67, 129, [1, 2, 197, 201], 5, id="odd"),
    pytest.param(1, 1, [3, 4], 1, id="one-weight"),
    pytest.param(210, 301, [193, 7, 500], 2, id="odd-many-tiles"),
]


def usable(backend: str, arguments: tuple[Tensor, ...]) -> None:
    """Skip a call that the backend refuses: an explicit request for it must raise."""
    try:
        ops.group_influence(*arguments, backend=backend)
    except RuntimeError as error:
        if "asked for by backend cannot run this call" not in str(error):
            raise
        pytest.skip(f"{backend} refuses this layout, with a reason")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("height", "width", "sizes", "tasks"), [*LAYERS, *ODD_LAYERS])
@pytest.mark.parametrize(
    "grad_weight_dtype", [None, torch.float32, torch.bfloat16], ids=["none", "into-f32", "into-bf16"]
)
def test_values_and_total_stay_within_the_error_budget(
    make_call, backend: str, dtype: torch.dtype, height: int, width: int, sizes: list[int], tasks: int,
    grad_weight_dtype: torch.dtype | None,
) -> None:  # fmt: skip
    call = make_call(height, width, sizes, tasks, dtype)
    if height % 8 or width % 8:
        usable(backend, call.arguments)
    before = grad_weight = None
    if grad_weight_dtype is not None:
        before = torch.linspace(-3, 5, height * width, device=call.input.device).view(height, width)
        before = before.to(grad_weight_dtype)
        grad_weight = before.clone()
    values = ops.group_influence(*call.arguments, grad_weight=grad_weight, backend=backend)
    assert values.dtype == torch.float64
    assert values.device == call.input.device
    assert values.shape == (tasks, len(sizes))
    assert (values.cpu()[:, torch.tensor(sizes) == 0] == 0).all()
    call.check(values, grad_weight, before)


@pytest.mark.parametrize("queries_dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_queries_of_another_dtype_and_packed_ones(make_call, backend: str, queries_dtype: torch.dtype) -> None:
    call = make_call(136, 264, [100, 28, 131], 9)
    queries = call.queries.to(queries_dtype)
    plain = ops.group_influence(*call.arguments[:3], queries, backend=backend)
    packed = ops.group_influence(*call.arguments[:3], ops.pack_queries(queries), backend=backend)
    assert torch.equal(plain, packed)
    call.check(plain)


@pytest.mark.parametrize("case", ["no-rows", "no-domains", "no-tasks", "no-outputs", "no-inputs"])
@pytest.mark.usefixtures("poisoned_memory")
def test_nothing_sums_to_zero(device: torch.device, backend: str, case: str) -> None:
    rows, height, width, offsets, tasks = {
        "no-rows": (0, 8, 16, [0, 0, 0], 2),
        "no-domains": (0, 8, 16, [0], 2),
        "no-tasks": (5, 8, 16, [0, 5], 0),
        "no-outputs": (5, 0, 16, [0, 2, 5], 2),
        "no-inputs": (5, 8, 0, [0, 2, 5], 2),
    }[case]
    input, grad_output, queries = (
        torch.ones(*shape, dtype=torch.bfloat16, device=device)
        for shape in ((rows, width), (rows, height), (tasks, height, width))
    )
    grad_weight = torch.full((height, width), 7.0, device=device)
    values = ops.group_influence(
        input, grad_output, torch.tensor(offsets, device=device), queries, grad_weight=grad_weight, backend=backend
    )
    assert values.shape == (tasks, len(offsets) - 1)
    assert (values == 0).all()
    torch.testing.assert_close(grad_weight, 7.0 + grad_output.float().T @ input.float())


def test_every_tile_edge(make_call, backend: str) -> None:
    for height in (8, 120, 128, 136):
        for width in (8, 56, 64, 72, 248, 256, 264):
            call = make_call(height, width, [63, 0, 65, 1], 3)
            grad_weight = torch.zeros(height, width, device=call.input.device)
            values = ops.group_influence(*call.arguments, grad_weight=grad_weight, backend=backend)
            call.check(values, grad_weight, torch.zeros_like(grad_weight))


def test_every_length_of_a_domain(make_call, backend: str) -> None:
    call = make_call(64, 72, list(range(140)), 2)
    call.check(ops.group_influence(*call.arguments, backend=backend))


@pytest.mark.parametrize("lay_out", [transposed, every_third_row, every_other_column, unaligned])
@pytest.mark.parametrize("which", [0, 1, 3], ids=["input", "grad_output", "queries"])
def test_strides(make_call, backend: str, dtype: torch.dtype, which: int, lay_out) -> None:
    call = make_call(72, 136, [50, 0, 77], 3, dtype)
    arguments = list(call.arguments)
    arguments[which] = lay_out(arguments[which])
    usable(backend, tuple(arguments))
    call.check(ops.group_influence(*arguments, backend=backend))


@pytest.mark.parametrize("lay_out", [transposed, every_third_row, every_other_column, unaligned])
@pytest.mark.parametrize("total_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_strides_of_grad_weight_and_what_lies_between(
    make_call, backend: str, total_dtype: torch.dtype, lay_out
) -> None:
    call = make_call(72, 136, [50, 0, 77], 3)
    before = torch.full((72, 136), 3.0, dtype=total_dtype, device=call.input.device)
    grad_weight = lay_out(before)
    everything = torch.empty(0, dtype=total_dtype, device=before.device).set_(grad_weight.untyped_storage())
    untouched = everything.isnan()
    ops.group_influence(*call.arguments, grad_weight=grad_weight, backend=backend)
    right = 3.0 + call.gradients.sum(0)
    torch.testing.assert_close(grad_weight.double(), right, rtol=4 * torch.finfo(total_dtype).eps, atol=1e-3)
    assert torch.equal(everything.isnan(), untouched)


@pytest.mark.parametrize("every", [1, 2], ids=["contiguous", "strided"])
def test_order_equals_a_sorted_copy(make_call, backend: str, dtype: torch.dtype, every: int) -> None:
    call = make_call(72, 136, [50, 0, 77, 130], 3, dtype)
    rows = len(call.input)
    permutation = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).to(call.input.device)
    mixed_input, mixed_grad = torch.empty_like(call.input), torch.empty_like(call.grad_output)
    mixed_input[permutation], mixed_grad[permutation] = call.input, call.grad_output
    order = permutation.repeat_interleave(every)[::every]
    grad_weight = torch.zeros(72, 136, device=call.input.device)
    values = ops.group_influence(
        mixed_input, mixed_grad, call.offsets, call.queries, order=order, grad_weight=grad_weight, backend=backend
    )
    call.check(values, grad_weight, torch.zeros_like(grad_weight))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_nan_reaches_its_own_domain_and_the_total_only(
    make_call, backend: str, dtype: torch.dtype, poison: float
) -> None:
    call = make_call(72, 136, [99, 101, 99], 3, dtype)
    right = call.values.clone()
    call.input[199, 11] = poison  # the last row of a domain of odd length
    grad_weight = torch.zeros(72, 136, device=call.input.device)
    values = ops.group_influence(*call.arguments, grad_weight=grad_weight, backend=backend)
    assert not values[:, 1].isfinite().any()
    scale = call.queries.double().flatten(1).norm(dim=1)[:, None] * call.gradients.flatten(1).norm(dim=1)
    assert ((values - right).abs() <= 1e-3 * scale)[:, [0, 2]].all()
    assert not grad_weight[:, 11].isfinite().any()
    assert grad_weight[:, :11].isfinite().all()
    assert grad_weight[:, 12:].isfinite().all()


def test_a_nan_in_one_query_reaches_its_own_task_only(make_call, backend: str) -> None:
    call = make_call(72, 136, [20, 0, 30], 6)
    call.queries[2, 71, 135] = math.nan
    values = ops.group_influence(*call.arguments, backend=backend)
    assert values[2, [0, 2]].isnan().all()
    assert values[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("with_total", [False, True])
def test_a_small_domain_after_a_huge_one_keeps_its_digits(
    make_call, backend: str, dtype: torch.dtype, with_total: bool
) -> None:
    call = make_call(72, 136, [200, 3, 200], 2, dtype)
    call.input[:200] *= 1e3
    grad_weight = torch.zeros(72, 136, device=call.input.device) if with_total else None
    call.check(ops.group_influence(*call.arguments, grad_weight=grad_weight, backend=backend))


def test_two_runs_give_the_same_bits(make_call, backend: str, dtype: torch.dtype) -> None:
    call = make_call(776, 520, [1000, 1, 999, 0, 1500], 9, dtype)
    first = None
    for _ in range(5):
        grad_weight = torch.zeros(776, 520, device=call.input.device)
        values = ops.group_influence(*call.arguments, grad_weight=grad_weight, backend=backend)
        first = first or (values, grad_weight)
        assert torch.equal(values, first[0])
        assert torch.equal(grad_weight, first[1])


def test_reading_changes_no_argument(make_call, backend: str) -> None:
    call = make_call(72, 136, [50, 77], 3)
    before = [tensor.clone() for tensor in call.arguments]
    ops.group_influence(*call.arguments, backend=backend)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(call.arguments, before, strict=True))


def test_offsets_may_stay_on_the_cpu_and_are_checked_there(make_call, backend: str) -> None:
    call = make_call(72, 136, [50, 77], 3)
    input, grad_output, offsets, queries = call.arguments
    values = ops.group_influence(input, grad_output, offsets.cpu(), queries, backend=backend)
    assert torch.equal(values, ops.group_influence(*call.arguments, backend=backend))
    with pytest.raises(ValueError, match="offsets must"):
        ops.group_influence(input, grad_output, torch.tensor([0, 50, 126]), queries, backend=backend)


def test_the_automatic_choice_is_as_right(make_call, device: torch.device) -> None:
    for sizes in ([400, 600], [40] * 26):
        call = make_call(264, 392, sizes, 9)
        grad_weight = torch.zeros(264, 392, device=device)
        call.check(
            ops.group_influence(*call.arguments, grad_weight=grad_weight), grad_weight, torch.zeros_like(grad_weight)
        )
