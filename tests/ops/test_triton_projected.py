"""The projected Triton kernels in Triton's interpreter, with blocks so small that a few rows have many.

The suites that run on every backend use the blocks that the backend chooses; here are the ways they do not reach.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels import NOTHING, WRONG_ROWS
from tikmix_fast import ops, testing
from tikmix_fast.ops.backends import reference
from tikmix_fast.ops.common.device_checks import WRONG_OFFSETS, WRONG_ORDER
from tikmix_fast.ops.common.projected_checks import ProjectedArguments
from tikmix_fast.ops.common.projection import ProjectionKind, factor_matrix

pytest.importorskip("triton", reason="the Triton kernels need triton")

from tikmix_fast.ops.backends.triton import configs, projected, unavailable

pytestmark = [
    pytest.mark.skipif(unavailable() is not None, reason=f"triton: {unavailable()}"),
    pytest.mark.skipif(not configs.INTERPRETED, reason="for the interpreter: unset where a GPU runs the other suites"),
]

KINDS = get_args(ProjectionKind)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = ["f32", "bf16", "f16"]
SHAPES = [  # O, I, k_out, k_in, domains' rows, tasks
    pytest.param(1, 1, 16, 16, [1], 1, id="one-row"),
    pytest.param(40, 37, 64, 16, [0, 9, 0, 0, 28, 0], 2, id="empty-domains"),
    pytest.param(7, 65, 16, 128, [16, 1, 15, 32, 3], 3, id="around-a-block"),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projected, "_OF_INTERPRETER", (projected.Blocks(16, 32, 4, 1),))


def problem(
    height: int, width: int, k_out: int, k_in: int, sizes: list[int], tasks: int, kind: str, dtype: torch.dtype
) -> ProjectedArguments:
    generator = torch.Generator().manual_seed(height + 100 * width + sum(sizes))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    projection = ops.LayerProjection(height, width, k_out=k_out, k_in=k_in, kind=kind)
    return ProjectedArguments(
        normal(sum(sizes), width).to(dtype),
        normal(sum(sizes), height).to(dtype),
        torch.tensor([0, *sizes]).cumsum(0),
        projection.project(normal(tasks, height, width)),
        projection.output_factor,
        projection.input_factor,
        projection.scale,
        None,
    )


def integers(
    height: int, width: int, k_out: int, k_in: int, sizes: list[int], tasks: int, kind: str, *, shuffled: bool
) -> ProjectedArguments:
    """Numbers so small and whole that no sum has a rounding, in any order."""
    generator = torch.Generator().manual_seed(height + 100 * width + sum(sizes))

    def whole(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    if kind == "pair":
        factors = (whole(k_out, height), whole(k_in, width))
    else:
        projection = ops.LayerProjection(height, width, k_out=k_out, k_in=k_in, kind=kind)
        factors = (projection.output_factor, projection.input_factor)
    rows = sum(sizes)
    order = torch.randperm(rows, generator=generator) if shuffled else None
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return ProjectedArguments(
        whole(rows, width), whole(rows, height), offsets, whole(tasks, k_out, k_in), *factors, 0.5, order
    )


def expected_gradients(call: ProjectedArguments) -> Tensor:
    """Every domain's projected gradient, float64 [m, k_out, k_in], from the whole one."""
    input, grad_output, offsets, queries, output_factor, input_factor, scale, order = call
    whole = testing.domain_gradients(input, grad_output, offsets, order)
    output_matrix = factor_matrix(output_factor, queries.shape[1], torch.float64)
    return scale * (output_matrix @ whole @ factor_matrix(input_factor, queries.shape[2], torch.float64).T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(("height", "width", "k_out", "k_in", "sizes", "tasks"), SHAPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_values_and_gradients_stay_within_the_error_budget(
    height: int, width: int, k_out: int, k_in: int, sizes: list[int], tasks: int, dtype: torch.dtype, kind: str
) -> None:
    """Twice the error of torch's products, all in float32: the kernel rounds nothing to 16 bits."""
    call = problem(height, width, k_out, k_in, sizes, tasks, kind, dtype)
    gradients = expected_gradients(call)
    expected = reference.projected_group_influence(call)
    small_input, small_grad = (
        rows.float() @ factor_matrix(factor, dim, torch.float32).T
        for rows, factor, dim in (
            (call.input, call.input_factor, k_in),
            (call.grad_output, call.output_factor, k_out),
        )
    )
    eager, _ = testing.eager_group_influence(small_input, small_grad, call.offsets, call.queries)
    floor = testing.rounding_floor(k_out * k_in)
    values = projected.projected_group_influence(call)
    assert values.dtype == torch.float64
    testing.check_budget(
        testing.influence_error(values, expected, call.queries, gradients),
        testing.influence_error(call.scale * eager, expected, call.queries, gradients),
        floor,
    )
    computed = projected.projected_domain_gradients(call)
    assert computed.dtype == torch.float32
    for (start, end), value, gradient in zip(
        itertools.pairwise(call.offsets.tolist()), computed, gradients, strict=True
    ):
        by_hand = call.scale * (small_grad[start:end].T @ small_input[start:end])
        testing.check_budget(
            testing.gradient_error(value, gradient), testing.gradient_error(by_hand, gradient), 2.0**-22
        )


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(0, 30), max_size=5),
    st.integers(1, 12),
    st.integers(1, 40),
    st.sampled_from([*KINDS, "pair"]),
    st.booleans(),
    st.sampled_from([1, 2, 5]),
)
def test_any_layout_is_exact(
    sizes: list[int], height: int, width: int, kind: str, shuffled: bool, multiprocessors: int
) -> None:
    """Whole numbers have no rounding: a row lost, taken twice or given to a neighbour is seen."""
    k_out, k_in = (32, 16) if kind == "countsketch" else (3, 17)
    call = integers(height, width, k_out, k_in, sizes, 2, kind, shuffled=shuffled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projected, "_OF_INTERPRETER", (projected.Blocks(16, 32, 4, 1),))
        patch.setattr(projected, "multiprocessors", lambda device: multiprocessors)
        values = projected.projected_group_influence(call)
        gradients = projected.projected_domain_gradients(call)
    assert torch.equal(values, reference.projected_group_influence(call))
    assert torch.equal(gradients.double(), expected_gradients(call))


@pytest.mark.parametrize("kind", [*KINDS, "pair"])
@pytest.mark.parametrize(("k_out", "k_in"), [(1, 64), (128, 1), (20, 130)])
def test_any_number_of_rows_of_the_matrices(k_out: int, k_in: int, kind: str) -> None:
    if kind == "countsketch":
        k_out, k_in = (max(16, 2 ** (k - 1).bit_length()) for k in (k_out, k_in))
    call = integers(5, 18, k_out, k_in, [4, 0, 7], 9, kind, shuffled=False)
    assert torch.equal(projected.projected_group_influence(call), reference.projected_group_influence(call))
    assert torch.equal(projected.projected_domain_gradients(call).double(), expected_gradients(call))


@pytest.mark.parametrize("input_dtype", [*DTYPES])
@pytest.mark.parametrize("factor_dtype", [*DTYPES])
def test_matrices_are_not_rounded_to_what_the_rows_are(input_dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(*shape, generator=generator).to(factor_dtype) for shape in ((20, 9), (5, 30))]
    rows = [torch.randn(21, size, generator=generator) for size in (30, 9)]
    call = ProjectedArguments(
        rows[0].to(input_dtype), rows[1], torch.tensor([0, 21]), torch.ones(1, 20, 5), *pair, 2.0, None
    )
    for swapped in (call, call._replace(input=rows[0], grad_output=rows[1].to(input_dtype))):
        assert projected.refusal(swapped) is None
        (gradient,) = expected_gradients(swapped)
        assert testing.gradient_error(projected.projected_domain_gradients(swapped)[0], gradient).error < 1e-5


def test_matrices_of_float64_are_refused() -> None:
    call = integers(5, 18, 3, 4, [7], 1, "pair", shuffled=False)
    assert projected.refusal(call) is None
    for name in ("output_factor", "input_factor"):
        assert projected.refusal(call._replace(**{name: getattr(call, name).double()})) == (
            f"{name} is torch.float64, none of float32, bfloat16 and float16"
        )


@pytest.mark.parametrize("kind", ["countsketch", "pair"])
@pytest.mark.parametrize("which", ["input", "grad_output", "queries", "output_factor", "input_factor", "offsets"])
def test_strides_change_nothing(which: str, kind: str) -> None:
    call = integers(18, 21, 16, 32, [20, 5], 3, kind, shuffled=True)
    expected = reference.projected_group_influence(call)
    tensor = getattr(call, which)
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 99, dtype=tensor.dtype)
    wide[..., ::2] = tensor
    layouts = [wide[..., ::2]]
    if tensor.dim() > 1:
        layouts += [tensor.mT.contiguous().mT, torch.stack([tensor] * 3, -2).flatten(-3, -2)[..., 1::3, :]]
    for laid_out in layouts:
        assert torch.equal(laid_out, tensor)
        assert torch.equal(projected.projected_group_influence(call._replace(**{which: laid_out})), expected)


@pytest.mark.parametrize("which", ["input", "grad_output", "input_factor"])
def test_strides_beyond_32_bits(which: str) -> None:
    """Only the pages that are touched of this allocation become memory."""
    call = integers(9, 10, 3, 3, [1, 2], 2, "pair", shuffled=False)
    far = 2**30 + 8  # in the third row, further than 32 bits count
    distant = torch.empty(2 * far + 32, dtype=torch.float16).as_strided((3, getattr(call, which).shape[1]), (far, 1))
    distant.copy_(getattr(call, which))
    expected = reference.projected_group_influence(call)
    assert torch.equal(projected.projected_group_influence(call._replace(**{which: distant})), expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["countsketch", "gaussian"])
@pytest.mark.parametrize("name", ["input", "grad_output"])
def test_what_is_not_finite_stays_in_its_domain(name: str, kind: str, poison: float) -> None:
    call = problem(20, 37, 16, 32, [12, 1, 8], 3, kind, torch.float32)
    getattr(call, name)[12, 3] = poison
    values = projected.projected_group_influence(call)
    assert not values[:, 1].isfinite().any()
    assert values[:, [0, 2]].isfinite().all()
    finite = projected.projected_domain_gradients(call).isfinite().flatten(1)
    assert finite[[0, 2]].all()
    assert not finite[1].all()


def test_a_nan_in_one_query_reaches_its_own_task_and_no_empty_domain() -> None:
    call = integers(9, 10, 3, 4, [5, 0, 20], 3, "pair", shuffled=False)
    call.queries[1, 2, 3] = math.nan
    values = projected.projected_group_influence(call)
    assert torch.equal(values.isnan(), torch.tensor([[0, 0, 0], [1, 0, 1], [0, 0, 0]]).bool())


def test_two_runs_are_the_same_bits() -> None:
    call = problem(9, 40, 64, 32, [20, 3, 30], 3, "gaussian", torch.bfloat16)
    first, second = (projected.projected_group_influence(call) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(projected.projected_domain_gradients(call), projected.projected_domain_gradients(call))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("rows", "height", "width", "offsets", "tasks"), NOTHING)
@pytest.mark.parametrize("noted", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("kind", ["countsketch", "rademacher"])
def test_nothing_sums_to_zero(
    kind: str, rows: int, height: int, width: int, offsets: list[int], tasks: int, noted: bool
) -> None:
    projection = ops.LayerProjection(height, width, k_out=32, k_in=16, kind=kind)
    call = ProjectedArguments(
        torch.ones(rows, width),
        torch.ones(rows, height),
        torch.tensor(offsets),
        torch.ones(tasks, 32, 16),
        projection.output_factor,
        projection.input_factor,
        projection.scale,
        torch.arange(rows) if noted else None,
    )
    flag = torch.zeros(1, dtype=torch.int32) if noted else None
    values = projected.projected_group_influence(call, flag=flag)
    assert values.shape == (tasks, len(offsets) - 1)
    assert (values == 0).all()
    torch.testing.assert_close(projected.projected_domain_gradients(call, flag=flag), expected_gradients(call).float())
    assert flag is None or flag.item() == 0


@pytest.mark.parametrize(("offsets", "row", "code"), WRONG_ROWS)
def test_what_the_host_must_not_read_is_noted(offsets: list[int], row: int | None, code: int) -> None:
    call = integers(9, 10, 3, 4, [40], 2, "pair", shuffled=row is not None)._replace(offsets=torch.tensor(offsets))
    if row is not None:
        call.order[17] = row
    for run in (projected.projected_group_influence, projected.projected_domain_gradients):
        flag = torch.zeros(1, dtype=torch.int32)
        assert run(call, flag=flag).isnan().all()
        assert flag.item() == code
        with pytest.raises(ValueError, match="offsets must" if code & WRONG_OFFSETS else "order must be a permutation"):
            run(call)


def test_rows_that_a_kernel_checks_are_taken_where_they_are_right() -> None:
    call = integers(9, 10, 3, 4, [15, 25], 2, "pair", shuffled=True)
    flag = torch.full((1,), WRONG_ORDER, dtype=torch.int32)
    assert torch.equal(projected.projected_group_influence(call, flag=flag), reference.projected_group_influence(call))
    assert flag.item() == WRONG_ORDER  # of an earlier call, until somebody reads it


COMPILE = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch, triton
from triton.runtime.jit import JITFunction
from compile_triton import Machine, report
from tikmix_fast import ops
from tikmix_fast.ops.common.projected_checks import ProjectedArguments
from tikmix_fast.ops.backends.triton import projected

compiled, launch = [], JITFunction.run
def compile_only(self, *args, **options):
    compiled.append(launch(self, *args, **options | {"warmup": True}))
JITFunction.run = compile_only
reports = []
architecture, calls = json.loads(sys.argv[2])
triton.runtime.driver.set_active(Machine(architecture))
for kind, dim in calls:
    projected._OF_INTERPRETER = projected._usable("wgmma" if architecture == 90 else "mma", dim)[:1]
    projection = ops.LayerProjection(512, 256, k_out=dim, k_in=dim, kind=kind)
    rows = [torch.zeros(512, size, dtype=torch.bfloat16) for size in (256, 512)]
    compiled.clear()
    projected.projected_group_influence(ProjectedArguments(
        *rows, torch.tensor([0, 100, 512]), torch.zeros(3, dim, dim),
        projection.output_factor, projection.input_factor, projection.scale, None,
    ))
    reports.append([report(each) for each in compiled])
print(json.dumps(reports))
"""


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90], ids="sm_{}".format)
def test_compiled_for_gpus_the_loops_use_tensor_cores_and_spill_nothing(architecture: int) -> None:
    """The untuned kernels, compiled by the Triton that is installed; on Hopper both loops over columns use wgmma.

    It passed with Triton 3.6 and 3.8. `projected._SPILLING` names blocks that spill with 3.8 and are not used there.
    """
    calls = list(itertools.product(["countsketch", "rademacher"], [64, 128]))
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(Path(__file__).parent), json.dumps([architecture, calls])]
    done = subprocess.run(command, capture_output=True, text=True, env=plain, check=False)
    assert done.returncode == 0, done.stderr
    for walk, reduction in json.loads(done.stdout.splitlines()[-1]):
        assert (walk["name"], reduction["name"]) == ("walk_rows", "sum_slots")
        loops = walk["wgmma" if architecture == 90 else "mma"]
        assert len(loops) >= 2
        assert all(spills == 0 for _, spills in loops)
        assert reduction["stack"] == 0
        assert walk["shared"] <= {80: 163 << 10, 90: 227 << 10}[architecture]
