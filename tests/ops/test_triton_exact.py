"""The exact Triton kernels in Triton's interpreter, with tiles so small that layers of a few numbers have many.

The suites that run on every backend use the tiles that the backend chooses; here are the ways they do not reach.
"""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels import NOTHING, WRONG_ROWS, check_group_influence
from tests.layouts import every_other_column, padded_rows, transposed
from tikmix_fast.ops.backends import reference
from tikmix_fast.ops.common.checks import Arguments
from tikmix_fast.ops.common.device_checks import WRONG_OFFSETS, WRONG_ORDER
from tikmix_fast.testing import domain_gradients

pytest.importorskip("triton", reason="the Triton kernels need triton")

from tikmix_fast.ops.backends.triton import configs, fused, gradient, two_pass, unavailable

pytestmark = [
    pytest.mark.skipif(unavailable() is not None, reason=f"triton: {unavailable()}"),
    pytest.mark.skipif(not configs.INTERPRETED, reason="for the interpreter: unset where a GPU runs the other suites"),
]

TINY = configs.Tile(16, 32, 16, 4, 2)


@pytest.fixture(params=[fused, two_pass], ids=["fused", "two-pass"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Both kernels; the panels of the second are a tile or two."""
    monkeypatch.setattr(two_pass, "PANEL_BYTES", 4 * 5 * 16 * 32)
    monkeypatch.setattr(two_pass, "_PROGRAMS_PER_MULTIPROCESSOR", 1)
    return request.param


def problem(
    rows: int,
    height: int,
    width: int,
    sizes: list[int],
    tasks: int,
    dtype: torch.dtype = torch.float32,
    *,
    shuffled: bool = False,
    total: torch.dtype | None = torch.float32,
) -> Arguments:
    generator = torch.Generator().manual_seed(rows + 10 * height + tasks)
    assert sum(sizes) == rows

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return Arguments(
        tensor(rows, width),
        tensor(rows, height),
        torch.tensor([0, *sizes]).cumsum(0),
        tensor(tasks, height, width),
        panels=None,
        order=torch.randperm(rows, generator=generator) if shuffled else None,
        grad_weight=None if total is None else torch.linspace(-1, 2, height * width).view(height, width).to(total),
    )


def run(kernel: ModuleType, call: Arguments, **options: object) -> tuple[Tensor, Tensor | None]:
    """Run on a copy of what is written to."""
    grad_weight = None if call.grad_weight is None else call.grad_weight.clone()
    return kernel.group_influence(call._replace(grad_weight=grad_weight), tile=TINY, **options), grad_weight


def right_answer(call: Arguments) -> tuple[Tensor, Tensor]:
    """Return values and gradients of all domains in float64."""
    gradients = domain_gradients(call.input, call.grad_output, call.offsets, call.order)
    return torch.einsum("noi,moi->nm", call.queries.double(), gradients), gradients


def check(call: Arguments, values: Tensor, grad_weight: Tensor | None) -> None:
    check_group_influence(
        *(call.input, call.grad_output, call.offsets, call.queries, call.order),
        values=values,
        grad_weight=grad_weight,
        before=call.grad_weight,
    )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("dtype", "shuffled"),
    [
        pytest.param(torch.float32, False, id="f32-sorted"),
        pytest.param(torch.float32, True, id="f32-ordered"),
        pytest.param(torch.bfloat16, False, id="bf16-sorted"),
        pytest.param(torch.float16, True, id="f16-ordered", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("rows", "height", "width", "sizes", "tasks", "splits", "total"),
    [
        pytest.param(37, 17, 65, [37], 2, 3, torch.float32, id="one-domain-in-three-splits"),
        pytest.param(41, 17, 40, [0, 19, 0, 1, 21, 0], 3, 1, torch.bfloat16, id="empty-domains"),
        pytest.param(21, 17, 30, [0, 1, 1, 19], 20, 4, None, id="splits-inside-and-between"),
        pytest.param(32, 16, 32, [16, 16], 1, 2, torch.float32, id="whole-tiles"),
    ],
)
def test_values_and_total_stay_within_the_error_budget(
    kernel: ModuleType,
    rows: int,
    height: int,
    width: int,
    sizes: list[int],
    tasks: int,
    splits: int,
    total: torch.dtype | None,
    shuffled: bool,
    dtype: torch.dtype,
) -> None:
    call = problem(rows, height, width, sizes, tasks, dtype, shuffled=shuffled, total=total)
    values, grad_weight = run(kernel, call, splits=splits)
    assert values.dtype == torch.float64
    assert (values[:, torch.tensor(sizes) == 0] == 0).all()
    check(call, values, grad_weight)


def test_two_runs_are_the_same_bits(kernel: ModuleType) -> None:
    call = problem(50, 33, 40, [20, 30], 3, shuffled=True)
    (one, total), (other, other_total) = run(kernel, call, splits=2), run(kernel, call, splits=2)
    assert torch.equal(one, other)
    assert torch.equal(total, other_total)


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="f16", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("width", [48, 41], ids=["described", "pointers"])
def test_tensor_descriptors_and_pointers_read_the_same(kernel: ModuleType, dtype: torch.dtype, width: int) -> None:
    """A described tensor copied to where the accelerator cannot read it gives the same bits."""
    call = problem(40, 24, width, [21, 0, 19], 2, dtype)
    prepared = gradient.prepare(call)
    assert (gradient.descriptors(prepared, TINY)[0] is not None) == (width == 48)
    shifted = {}
    for name in ("input", "grad_output", "queries"):
        tensor = getattr(call, name)
        shifted[name] = torch.cat([tensor.new_full((1,), math.nan), tensor.flatten()])[1:].view(tensor.shape)
    moved = call._replace(**shifted)
    if dtype != torch.bfloat16:  # of which the interpreter gets a copy
        assert gradient.descriptors(gradient.prepare(moved), TINY) == (None, None)
    values, total = run(kernel, call)
    other_values, other_total = run(kernel, moved)
    assert torch.equal(values, other_values)
    assert torch.equal(total, other_total)


def test_many_domains_and_tasks(kernel: ModuleType) -> None:
    """More than one group of each in the second pass, and more domains than are counted at a time."""
    call = problem(28, 5, 7, [1] * 8 + [0] * 125 + [20], 33, shuffled=True)
    check(call, *run(kernel, call, splits=2))


def test_both_kernels_agree() -> None:
    call = problem(60, 20, 50, [30, 1, 29], 2)
    (one, total), (other, other_total) = run(fused, call), run(two_pass, call)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(total, other_total, rtol=1e-6, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("width", [48, 41], ids=["described", "pointers"])
def test_a_nan_reaches_its_own_domain_and_the_total_only(kernel: ModuleType, width: int, poison: float) -> None:
    """The poisoned rows are next to other domains, in the block of rows that their last rows are in."""
    call = problem(50, 20, width, [19, 12, 19], 2)
    call.input[30, 11] = poison
    call.grad_output[19, 3] = poison
    values, grad_weight = run(kernel, call, splits=2)
    clean, _ = right_answer(problem(50, 20, width, [19, 12, 19], 2))
    assert not values[:, 1].isfinite().any()
    torch.testing.assert_close(values[:, [0, 2]], clean[:, [0, 2]], rtol=1e-4, atol=1e-3)
    touched = torch.zeros_like(grad_weight, dtype=torch.bool)
    touched[:, 11] = touched[3] = True
    assert torch.equal(grad_weight.isfinite(), ~touched)


def test_a_nan_in_one_query_reaches_its_own_task_only(kernel: ModuleType) -> None:
    call = problem(30, 20, 48, [10, 0, 20], 5)
    call.queries[2, 19, 47] = math.nan
    values, _ = run(kernel, call)
    assert values[2, [0, 2]].isnan().all()
    assert values[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("rows", "height", "width", "offsets", "tasks"), NOTHING)
@pytest.mark.parametrize("noted", [False, True], ids=["host", "device"])
def test_nothing_sums_to_zero(
    kernel: ModuleType, rows: int, height: int, width: int, offsets: list[int], tasks: int, noted: bool
) -> None:
    call = Arguments(
        torch.ones(rows, width),
        torch.ones(rows, height),
        torch.tensor(offsets),
        torch.ones(tasks, height, width),
        None,
        torch.arange(rows) if noted else None,
        torch.full((height, width), 7.0),
    )
    flag = torch.zeros(1, dtype=torch.int32) if noted else None
    values, grad_weight = run(kernel, call, flag=flag)
    assert values.shape == (tasks, len(offsets) - 1)
    assert (values == 0).all()
    torch.testing.assert_close(grad_weight, 7.0 + call.grad_output.T @ call.input)
    assert flag is None or flag.item() == 0


WRONG = [*WRONG_ROWS, pytest.param([5], -1, WRONG_OFFSETS | WRONG_ORDER, id="both-and-no-domain")]


@pytest.mark.parametrize(("offsets", "row", "code"), WRONG)
def test_what_the_host_must_not_read_is_noted_and_nothing_is_touched(
    kernel: ModuleType, offsets: list[int], row: int | None, code: int
) -> None:
    call = problem(40, 10, 20, [40], 2, shuffled=row is not None)._replace(offsets=torch.tensor(offsets))
    if row is not None:
        call.order[17] = row
    flag = torch.zeros(1, dtype=torch.int32)
    values, grad_weight = run(kernel, call, flag=flag)
    assert values.isnan().all()
    assert torch.equal(grad_weight, call.grad_weight)
    assert flag.item() == code
    with pytest.raises(ValueError, match="offsets must" if code & WRONG_OFFSETS else "order must be a permutation"):
        run(kernel, call)


def test_rows_that_a_kernel_checks_are_taken_where_they_are_right(kernel: ModuleType) -> None:
    call = problem(40, 20, 40, [15, 25], 2, shuffled=True)
    flag = torch.full((1,), WRONG_ORDER, dtype=torch.int32)
    values, grad_weight = run(kernel, call, flag=flag)
    assert flag.item() == WRONG_ORDER  # of an earlier call, until somebody reads it
    check(call, values, grad_weight)


@pytest.mark.parametrize("name", ["input", "grad_output", "queries", "grad_weight"])
def test_strides_beyond_32_bits(kernel: ModuleType, name: str) -> None:
    """Only the pages that are touched of this allocation become memory."""
    call = problem(3, 3, 8, [1, 2], 3, torch.float16)
    values, grad_weight = run(kernel, call)
    far = 2**30 + 8  # in the third row, further than 32 bits count
    storage = torch.empty(2 * far + 32, dtype=torch.float16)
    near = getattr(call, name).half()
    strides = (far, 1) if near.dim() == 2 else (far, 8, 1)
    tensor = storage.as_strided(near.shape, strides)
    tensor.copy_(near)
    if name == "grad_weight":
        # Its own bytes are written.
        distant_values = kernel.group_influence(call._replace(grad_weight=tensor), tile=TINY)
        torch.testing.assert_close(tensor, grad_weight.half(), rtol=2e-3, atol=1e-3)
    else:
        distant_values, _ = run(kernel, call._replace(**{name: tensor}))
    assert torch.equal(distant_values, values)


def test_choice_of_splits() -> None:
    assert fused.choose_splits(1024, 132, 16384, 4, 9, 16) == 1
    assert fused.choose_splits(66, 132, 16384, 4, 1, 16) == 2
    assert fused.choose_splits(1, 132, 100000, 1, 1, 16) == 16
    assert fused.choose_splits(1, 132, 64, 1, 1, 0) == 1


@given(
    height=st.integers(1, 20000),
    width=st.integers(1, 20000),
    bytes_per_weight=st.integers(2, 4000),
)
def test_panels_fit_and_are_whole_tiles(height: int, width: int, bytes_per_weight: int) -> None:
    tile = configs.Tile(128, 128, 64, 8, 4)
    tall, wide = two_pass.panel_shape(height, width, tile, bytes_per_weight)
    one_tile = bytes_per_weight * min(128, height) * min(128, width)
    assert bytes_per_weight * tall * wide <= max(two_pass.PANEL_BYTES, one_tile)
    assert tall == height or tall % 128 == 0
    assert wide == width or wide % 128 == 0


@st.composite
def calls(draw: st.DrawFn) -> Arguments:
    sizes = draw(st.lists(st.integers(0, 20), max_size=4))
    rows, height, width = sum(sizes), draw(st.integers(1, 30)), draw(st.integers(1, 50))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    layouts = st.sampled_from([torch.Tensor.contiguous, transposed, every_other_column, padded_rows])

    def tensor(*shape: int) -> Tensor:
        return draw(layouts)(torch.randn(*shape, generator=generator).to(draw(dtypes)))

    return Arguments(
        tensor(rows, width),
        tensor(rows, height),
        torch.tensor([0, *sizes]).cumsum(0),
        tensor(draw(st.integers(0, 4)), height, width),
        None,
        torch.randperm(rows, generator=generator) if draw(st.booleans()) else None,
        tensor(height, width) if draw(st.booleans()) else None,
    )


@settings(deadline=None, max_examples=12)
@given(call=calls(), splits=st.sampled_from([None, 1, 2, 4]), which=st.sampled_from([fused, two_pass]))
def test_any_layout_is_within_the_rounding_error_bound_of_float32(
    call: Arguments, splits: int | None, which: ModuleType
) -> None:
    """The bound is the textbook one for sums of T products; the interpreter rounds no gradient to bfloat16."""
    storage = None if call.grad_weight is None else call.grad_weight.clone()
    before = None if call.grad_weight is None else call.grad_weight.double()
    values = which.group_influence(call, tile=TINY, splits=splits)
    right, gradients = right_answer(call)
    sizes = domain_gradients(call.input.abs(), call.grad_output.abs(), call.offsets, call.order)
    unit = torch.finfo(torch.float32).eps
    depth = len(call.input) + 16 * 32
    bound = depth * unit * torch.einsum("noi,moi->nm", call.queries.double().abs(), sizes)
    assert ((values - right).abs() <= bound).all()
    if storage is not None and before is not None and call.grad_weight is not None:
        total = before + gradients.sum(0)
        rounding = torch.finfo(call.grad_weight.dtype).eps * total.abs()
        error = (call.grad_weight.double() - total).abs()
        assert (error <= rounding + depth * unit * (sizes.sum(0) + before.abs())).all()


def test_the_reference_agrees() -> None:
    """The expectation of this file is not what the reference backend computes; they must not drift apart."""
    call = problem(40, 10, 12, [15, 25], 2, total=None)
    torch.testing.assert_close(right_answer(call)[0], reference.group_influence(call), rtol=1e-12, atol=1e-12)
