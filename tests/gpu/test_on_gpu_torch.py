"""The ops under torch on a GPU: schema, compilation, graphs, streams, devices, and late errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels import linear
from tikmix_fast import ops
from tikmix_fast.ops.common.device_checks import raise_on_device_errors

EXACT = torch.ops.tikmix_fast.group_influence.default
PROJECTED = torch.ops.tikmix_fast.projected_group_influence.default
PACK = torch.ops.tikmix_fast.pack_queries.default
SIZES = [50, 0, 77, 128]
HEIGHT, WIDTH, TASKS = 136, 264, 3


@pytest.fixture(autouse=True)
def nothing_left_behind(device: torch.device) -> Iterator[None]:
    """A test that leaves an error on the device would fail the next one."""
    yield
    if device.type == "cuda":
        raise_on_device_errors()


def projection_on(device: torch.device, kind: str = "rademacher") -> ops.LayerProjection:
    return ops.LayerProjection(HEIGHT, WIDTH, k_out=64, k_in=32, kind=kind, device=str(device))


@pytest.mark.parametrize("ordered", [False, True], ids=["in-order", "order"])
@pytest.mark.parametrize("total", [None, torch.float32, torch.bfloat16], ids=["none", "into-f32", "into-bf16"])
def test_opcheck(make_call, backend: str, device: torch.device, ordered: bool, total: torch.dtype | None) -> None:
    call = make_call(HEIGHT, WIDTH, SIZES, TASKS)
    order = torch.randperm(sum(SIZES)).to(device) if ordered else None
    grad_weight = None if total is None else torch.zeros(HEIGHT, WIDTH, dtype=total, device=device)
    panels = ops.pack_queries(call.queries).panels
    torch.library.opcheck(EXACT, (*call.arguments, panels, order, grad_weight, backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_opcheck_of_packing(device: torch.device, dtype: torch.dtype) -> None:
    torch.library.opcheck(PACK, (torch.ones(TASKS, HEIGHT, WIDTH, dtype=dtype, device=device),))


def test_opcheck_of_the_projected_op(make_call, backend: str, device: torch.device) -> None:
    call, projection = make_call(HEIGHT, WIDTH, SIZES, TASKS), projection_on(device)
    factors = (projection.output_factor, projection.input_factor, projection.scale)
    queries = projection.project(call.queries)
    torch.library.opcheck(PROJECTED, (*call.arguments[:3], queries, *factors, None, backend))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(make_call, backend: str, device: torch.device, compiler: str) -> None:
    def influence(
        input: Tensor, grad_output: Tensor, offsets: Tensor, packed: ops.PackedQueries, grad_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        values = ops.group_influence(input * 2, grad_output, offsets, packed, grad_weight=grad_weight, backend=backend)
        return values.sum(0), grad_weight + 1

    call = make_call(HEIGHT, WIDTH, SIZES, TASKS)
    packed = ops.pack_queries(call.queries)
    compiled = torch.compile(influence, fullgraph=True, backend=compiler)
    results = []
    for function in (influence, compiled):
        grad_weight = torch.ones(HEIGHT, WIDTH, device=device)
        results.append((*function(*call.arguments[:3], packed, grad_weight), grad_weight))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_the_projected_op_compiles_too(make_call, backend: str, device: torch.device) -> None:
    call, projection = make_call(HEIGHT, WIDTH, SIZES, TASKS), projection_on(device)
    queries = projection.project(call.queries)

    def influence(input: Tensor, grad_output: Tensor, offsets: Tensor) -> Tensor:
        return ops.projected_group_influence(input, grad_output, offsets, queries, projection, backend=backend) * 2

    compiled = torch.compile(influence, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*call.arguments[:3]), influence(*call.arguments[:3]))


class Replayed:
    """A call on fixed tensors, captured once."""

    def __init__(self, run: Callable[[], Tensor], device: torch.device) -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.values = run()


def test_a_graph_replays_on_new_inputs_and_new_offsets(make_call, backend: str, gpu: torch.device) -> None:
    first = make_call(HEIGHT, WIDTH, SIZES, TASKS)
    packed = ops.pack_queries(first.queries)
    grad_weight = torch.zeros(HEIGHT, WIDTH, device=gpu)
    input, grad_output, offsets = (tensor.clone() for tensor in first.arguments[:3])
    replayed = Replayed(
        lambda: ops.group_influence(input, grad_output, offsets, packed, grad_weight=grad_weight, backend=backend), gpu
    )
    for seed, sizes in enumerate(([50, 0, 77, 128], [0, 1, 4, 250], [100, 100, 55, 0])):
        call = make_call(HEIGHT, WIDTH, sizes, TASKS, seed=seed)
        input.copy_(call.input)
        grad_output.copy_(call.grad_output)
        offsets.copy_(call.offsets)
        grad_weight.zero_()
        replayed.values.fill_(7.0)
        replayed.graph.replay()
        expected_total = torch.zeros_like(grad_weight)
        expected = ops.group_influence(
            *call.arguments[:3], packed, grad_weight=expected_total, backend=backend
        )  # fmt: skip
        assert torch.equal(replayed.values, expected)
        assert torch.equal(grad_weight, expected_total)
        # The graph's queries are those of the first call.
        call._replace(queries=first.queries).check(expected, grad_weight, torch.zeros_like(grad_weight))


@pytest.mark.parametrize("kind", ["countsketch", "rademacher"])
def test_a_graph_of_the_projected_op(make_call, backend: str, gpu: torch.device, kind: str) -> None:
    projection = projection_on(gpu, kind)
    first = make_call(HEIGHT, WIDTH, SIZES, TASKS)
    queries = projection.project(first.queries)
    input, grad_output, offsets = (tensor.clone() for tensor in first.arguments[:3])
    replayed = Replayed(
        lambda: ops.projected_group_influence(input, grad_output, offsets, queries, projection, backend=backend), gpu
    )
    call = make_call(HEIGHT, WIDTH, [100, 100, 55, 0], TASKS)
    for static, new in zip((input, grad_output, offsets), call.arguments[:3], strict=True):
        static.copy_(new)
    replayed.graph.replay()
    expected = ops.projected_group_influence(*call.arguments[:3], queries, projection, backend=backend)
    assert torch.equal(replayed.values, expected)


def test_work_is_on_the_current_stream(make_call, backend: str, gpu: torch.device) -> None:
    """The inputs get their values late, on their own stream: work on another stream would miss them."""
    call = make_call(HEIGHT, WIDTH, SIZES, TASKS)
    projection = projection_on(gpu)
    queries = projection.project(call.queries)
    input, grad_weight = torch.zeros_like(call.input), torch.zeros(HEIGHT, WIDTH, device=gpu)
    # Compile and tune first: tuning makes the host wait.
    ops.group_influence(input, *call.arguments[1:], grad_weight=grad_weight, backend=backend)
    ops.projected_group_influence(*call.arguments[:3], queries, projection, backend=backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(gpu)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        input.copy_(call.input)
        values = ops.group_influence(input, *call.arguments[1:], grad_weight=grad_weight, backend=backend)
        small = ops.projected_group_influence(input, *call.arguments[1:3], queries, projection, backend=backend)
    stream.synchronize()
    call.check(values, grad_weight, torch.zeros_like(grad_weight))
    expected = ops.projected_group_influence(*call.arguments[:3], queries, projection, backend=backend)
    assert torch.equal(small, expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_host_waits_for_nothing(make_call, backend: str, gpu: torch.device) -> None:
    call, projection = make_call(HEIGHT, WIDTH, SIZES, TASKS), projection_on(gpu)
    packed, small = ops.pack_queries(call.queries), projection.project(call.queries)
    order = torch.arange(sum(SIZES), device=gpu)
    grad_weight = torch.zeros(HEIGHT, WIDTH, device=gpu)

    def run() -> None:
        ops.group_influence(*call.arguments[:3], packed, order=order, grad_weight=grad_weight, backend=backend)
        ops.group_influence(*call.arguments, backend=backend)
        ops.group_influence(*call.arguments[:3], packed, grad_weight=grad_weight)
        ops.projected_group_influence(*call.arguments[:3], small, projection, order=order, backend=backend)
        ops.pack_queries(call.queries)

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "wrong",
    [
        [0, 50, 50, 127, 254],
        [1, 50, 50, 127, 255],
        [0, 50, 40, 127, 255],
        [0, 50, 50, 127, 256],
        [-5, 0, 9, 9, 2**40],
    ],
)
def test_wrong_offsets_on_the_device_give_nan_and_an_error_later(
    make_call, backend: str, gpu: torch.device, wrong: list[int]
) -> None:
    call, projection = make_call(HEIGHT, WIDTH, SIZES, TASKS), projection_on(gpu)
    offsets = torch.tensor(wrong, device=gpu)
    queries = projection.project(call.queries)
    for run in (
        lambda offsets: ops.group_influence(*call.arguments[:2], offsets, call.queries, backend=backend),
        lambda offsets: ops.projected_group_influence(
            *call.arguments[:2], offsets, queries, projection, backend=backend
        ),
    ):
        assert run(offsets).isnan().all()
        with pytest.raises(ValueError, match="offsets must start at 0"):
            raise_on_device_errors()
        assert run(call.offsets).isfinite().all()
        raise_on_device_errors()


@pytest.mark.parametrize("entry", [-1, sum(SIZES), 2**40])
def test_a_wrong_order_on_the_device_gives_nan_and_an_error_later(
    make_call, backend: str, gpu: torch.device, entry: int
) -> None:
    call, projection = make_call(HEIGHT, WIDTH, SIZES, TASKS), projection_on(gpu)
    order = torch.arange(sum(SIZES), device=gpu)
    order[70] = entry
    assert ops.group_influence(*call.arguments, order=order, backend=backend).isnan().all()
    with pytest.raises(ValueError, match="order must be a permutation"):
        raise_on_device_errors()
    queries = projection.project(call.queries)
    small = ops.projected_group_influence(*call.arguments[:3], queries, projection, order=order, backend=backend)
    assert small.isnan().all()
    with pytest.raises(ValueError, match="order must be a permutation"):
        raise_on_device_errors()


def test_another_device_than_the_current_one(make_call, backend: str, gpu: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    other = torch.device("cuda", (gpu.index + 1) % torch.cuda.device_count())
    call = make_call(HEIGHT, WIDTH, SIZES, TASKS)
    expected = ops.group_influence(*call.arguments, backend=backend)
    values = ops.group_influence(*(tensor.to(other) for tensor in call.arguments), backend=backend)
    assert values.device == other
    torch.testing.assert_close(values.to(gpu), expected, rtol=1e-6, atol=0)
    assert torch.cuda.current_device() == gpu.index


def test_tensors_of_two_devices_are_refused(make_call, backend: str, gpu: torch.device) -> None:
    call = make_call(HEIGHT, WIDTH, SIZES, TASKS)
    with pytest.raises(ValueError, match="must be on the device of input"):
        ops.group_influence(call.input, call.grad_output.cpu(), call.offsets, call.queries, backend=backend)
    with pytest.raises(ValueError, match="must be on the device of input"):
        ops.group_influence(*call.arguments[:3], call.queries.cpu(), backend=backend)


def test_a_derivative_is_refused(make_call, backend: str, device: torch.device) -> None:
    call = make_call(HEIGHT, WIDTH, SIZES, TASKS)
    with pytest.raises(RuntimeError, match="no derivative, but input requires grad"):
        ops.group_influence(call.input.clone().requires_grad_(), *call.arguments[1:], backend=backend)


def test_autocast_changes_nothing(make_call, backend: str, device: torch.device) -> None:
    call = make_call(HEIGHT, WIDTH, SIZES, TASKS)
    expected = ops.group_influence(*call.arguments, backend=backend)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(ops.group_influence(*call.arguments, backend=backend), expected)


def test_runs_inside_backward(make_call, backend: str, device: torch.device) -> None:
    """Backward runs in a thread of autograd, with the device and stream of that thread."""
    call = make_call(HEIGHT, WIDTH, SIZES, TASKS)
    influence = []

    def measure(grad_output: Tensor, grad_weight: Tensor) -> None:
        arguments = (input, grad_output.contiguous(), call.offsets, call.queries)
        influence.append(ops.group_influence(*arguments, grad_weight=grad_weight, backend=backend))

    input = call.input.clone().requires_grad_()
    weight = torch.zeros(HEIGHT, WIDTH, dtype=torch.bfloat16, device=device, requires_grad=True)
    linear(input, weight, measure).backward(call.grad_output)
    call.check(influence[0], weight.grad, torch.zeros_like(weight))
