"""The ways among which a backend chooses by counting, each forced: the vendor's product, and Triton's two."""

from __future__ import annotations

import pytest
import torch

from tikmix_fast import ops
from tikmix_fast.ops.common.device_checks import raise_on_device_errors

pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic", "ignore:Synchronization debug mode is a prototype")

SHAPES = [  # O, I, sizes of the domains, n
    pytest.param(128, 256, [192], 1, id="one-domain"),
    pytest.param(72, 136, [1, 0, 197, 0, 0, 201, 0], 5, id="empty-domains"),
    pytest.param(768, 520, [700, 11, 1313, 24], 16, id="a-layer"),
    pytest.param(2056, 1032, [10] * 64, 20, id="several-panels"),
    pytest.param(64, 64, [1] * 1100, 2, id="1100-domains"),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("height", "width", "sizes", "tasks"), SHAPES)
@pytest.mark.parametrize("queries", [torch.bfloat16, torch.float32], ids=["q-bf16", "q-f32"])
@pytest.mark.parametrize("total", [None, torch.float32, torch.bfloat16], ids=["none", "into-f32", "into-bf16"])
def test_values(
    make_call, way: str, height: int, width: int, sizes: list[int], tasks: int, queries: torch.dtype,
    total: torch.dtype | None,
) -> None:  # fmt: skip
    call = make_call(height, width, sizes, tasks)
    arguments = (*call.arguments[:3], call.queries.to(queries))
    grad_weights = [None if total is None else torch.ones(height, width, device=call.input.device).to(total)] * 2
    grad_weights = [each if each is None else each.clone() for each in grad_weights]
    values, again = (ops.group_influence(*arguments, grad_weight=each, backend=way) for each in grad_weights)
    assert torch.equal(values, again)
    assert (values.cpu()[:, torch.tensor(sizes) == 0] == 0).all()
    first, second = grad_weights
    if first is None:
        call.check(values)
    else:
        assert torch.equal(first, second)
        call.check(values, first, torch.ones_like(first))


def test_order_equals_a_sorted_copy(make_call, way: str) -> None:
    call = make_call(72, 136, [50, 0, 77, 130], 3)
    order = torch.randperm(len(call.input), generator=torch.Generator().manual_seed(1)).to(call.input.device)
    input, grad_output = torch.empty_like(call.input), torch.empty_like(call.grad_output)
    input[order], grad_output[order] = call.input, call.grad_output
    grad_weight = torch.zeros(72, 136, device=call.input.device)
    values = ops.group_influence(
        input, grad_output, call.offsets, call.queries, order=order, grad_weight=grad_weight, backend=way
    )
    call.check(values, grad_weight, torch.zeros_like(grad_weight))


def test_a_nan_stays_in_its_domain(make_call, way: str) -> None:
    call = make_call(72, 136, [99, 101, 99], 3)
    call.input[199, 11] = torch.nan
    values = ops.group_influence(*call.arguments, backend=way)
    assert values[:, 1].isnan().all()
    assert values[:, [0, 2]].isfinite().all()


def test_the_host_waits_for_nothing_and_graphs_replay(make_call, way: str, gpu: torch.device) -> None:
    call = make_call(72, 136, [50, 0, 77, 130], 3)
    order, grad_weight = torch.arange(len(call.input), device=gpu), torch.zeros(72, 136, device=gpu)

    def run() -> torch.Tensor:
        ops.group_influence(*call.arguments, order=order, backend=way)
        return ops.group_influence(*call.arguments, grad_weight=grad_weight, backend=way)

    expected = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = run()
    values.fill_(7.0)
    graph.replay()
    assert torch.equal(values, expected)


@pytest.mark.parametrize("wrong", [[0, 50, 50, 127, 256], [0, 50, 40, 127, 257], [-5, 0, 9, 9, 2**40]])
def test_wrong_offsets_on_the_device_give_nan_and_an_error_later(
    make_call, way: str, gpu: torch.device, wrong: list[int]
) -> None:
    call = make_call(72, 136, [50, 0, 77, 130], 3)
    offsets = torch.tensor(wrong, device=gpu)
    assert ops.group_influence(*call.arguments[:2], offsets, call.queries, backend=way).isnan().all()
    with pytest.raises(ValueError, match="offsets must start at 0"):
        raise_on_device_errors()
    call.check(ops.group_influence(*call.arguments, backend=way))
