"""What the CUDA backend hands to its native module: a stand-in without a GPU reads the addresses that it is given.

It takes them as csrc/cuda/module.cpp says, computes by float64 in the host's memory, and asks the real module whether
the arguments have the types that it wants.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tikmix_fast import ops
from tikmix_fast.ops import dispatch
from tikmix_fast.ops.backends import cuda, reference
from tikmix_fast.ops.backends.cuda import exact, native
from tikmix_fast.ops.common import device_checks
from tikmix_fast.ops.common.checks import Arguments
from tikmix_fast.ops.common.gpu_cost import GpuCosts
from tikmix_fast.ops.common.projected_checks import ProjectedArguments

compiled = pytest.importorskip("tikmix_fast._cuda", reason="the CUDA module is not compiled in")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the module itself is called; see tests/gpu")

MULTIPROCESSORS, STREAM = 132, 77
ELEMENTS = {0: torch.float32, 1: torch.bfloat16, 2: torch.float16}
FACTORS = {**ELEMENTS, 3: torch.int8, 4: torch.int32}


def at(address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> Tensor:
    """Return the memory at an address as a tensor."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    if strides is None:
        strides = tuple(torch.empty(shape, device="meta").stride())
    numbers = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (numbers * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


class Module:
    """Stands in for ``tikmix_fast._cuda`` with addresses of the host's memory."""

    architectures, toolkit_version, has_wgmma = "80 90a", (13, 0), True

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._packed: dict[tuple[int, int], Tensor] = {}  # by address and element

    def _note(self, name: str, arguments: dict[str, Any]) -> None:
        self.calls.append(name)
        with pytest.raises(RuntimeError):  # from the runtime: there is no GPU. Of a wrong type, it is a TypeError.
            getattr(compiled, name)(**arguments)
        if name != "plan_projected":
            assert arguments["stream"] == STREAM

    def packed_layout(self, *, kernel: str, element: int) -> tuple[int, ...]:
        return compiled.packed_layout(kernel=kernel, element=element)

    def plan(self, **arguments: Any) -> tuple[int, int, int]:
        assert arguments["multiprocessors"] == MULTIPROCESSORS
        return compiled.plan(**arguments)

    def pack_queries(self, **arguments: Any) -> None:
        self._note("pack_queries", arguments)
        address, element, *strides = arguments["queries"]
        assert arguments["panels"][1] == (1 if element == 1 else 0)
        self._packed[arguments["panels"]] = at(address, ELEMENTS[element], arguments["sizes"], tuple(strides)).double()

    def group_influence(self, **arguments: Any) -> None:
        self._note("group_influence", arguments)
        rows, height, width, domains, tasks = arguments["sizes"]
        splits, items, split_elements = self.plan(
            kernel=arguments["kernel"], sizes=(rows, height, width), multiprocessors=arguments["multiprocessors"]
        )
        assert splits == arguments["splits"]
        nothing = torch.empty(0, height, width, dtype=torch.float64)
        call = self._rows(arguments, self._packed[arguments["queries"]] if tasks else nothing)
        partials, totals = arguments["workspace"]
        at(partials, torch.float32, (tasks * domains * items,)).fill_(torch.nan)
        total, total_element, stride = arguments["grad_weight"]
        if total:
            at(totals, torch.float32, (split_elements,)).fill_(torch.nan)
            before = at(total, ELEMENTS[total_element], (height, width), (stride, 1))
            before += (call.grad_output.double().T @ call.input.double()).to(before.dtype)
        at(arguments["values"], torch.float64, (tasks, domains)).copy_(reference.group_influence(call))
        at(arguments["flag"], torch.int32, (1,))[0] |= 0

    def plan_projected(self, **arguments: Any) -> tuple[int, int, int]:
        self._note("plan_projected", arguments)
        rows, k_out, k_in = arguments["sizes"]
        return (64 if max(k_out, k_in) <= 64 else 128), 128, max(1, rows // 128)

    def write_factor(self, **arguments: Any) -> None:
        self._note("write_factor", arguments)
        assert arguments["multiprocessors"] == MULTIPROCESSORS
        address, kind, dim, columns = arguments["factor"]
        to, element, padded, stride = arguments["matrix"]
        assert stride % 8 == 0
        matrix = at(to, ELEMENTS[element], (padded, stride)).zero_()
        if kind == 4:
            codes = at(address, torch.int32, (columns,))
            for column, code in enumerate(codes.tolist()):
                matrix[code if code >= 0 else ~code, column] = 1 if code >= 0 else -1
        else:
            matrix[:dim, :columns] = at(address, FACTORS[kind], (dim, columns)).to(matrix.dtype)

    def projected_group_influence(self, **arguments: Any) -> None:
        self._note("projected_group_influence", arguments)
        _, height, width, domains, tasks = arguments["sizes"]
        k_out, k_in = arguments["dims"]
        dim, _, splits = arguments["plan"]
        call = self._rows(arguments, at(arguments["queries"], torch.float32, (tasks, k_out, k_in)))
        output, input = (
            at(address, call.input.dtype, (dim, columns), (-(-columns // 8) * 8, 1)).double()
            for address, columns in zip(arguments["matrices"], (height, width), strict=True)
        )
        partials, slots = arguments["workspace"]
        at(partials, torch.float32, (tasks * domains * splits,)).fill_(torch.nan)
        small = call._replace(
            input=call.input.double() @ input[:k_in].T, grad_output=call.grad_output.double() @ output[:k_out].T
        )
        values = arguments["scale"] * reference.group_influence(small)
        at(arguments["values"], torch.float64, (tasks, domains)).copy_(values)
        if slots:
            at(slots, torch.float32, (domains + splits, k_out, k_in)).fill_(torch.nan)
            unit = torch.eye(k_out * k_in, dtype=torch.float64).view(-1, k_out, k_in)
            gradients = arguments["scale"] * reference.group_influence(small._replace(queries=unit)).T
            at(arguments["gradients"], torch.float32, (domains, k_out, k_in)).copy_(
                gradients.reshape(domains, k_out, k_in)
            )

    @staticmethod
    def _rows(arguments: dict[str, Any], queries: Tensor) -> Arguments:
        rows, height, width, domains, _ = arguments["sizes"]
        dtype = ELEMENTS[arguments["element"]]
        input, grad_output = (
            at(address, dtype, (rows, columns), (stride, 1))
            for (address, stride), columns in ((arguments["input"], width), (arguments["grad_output"], height))
        )
        for address, stride in (arguments["input"], arguments["grad_output"]):
            assert address % 16 == stride % 8 == 0
        order = at(arguments["order"], torch.int64, (rows,)) if arguments["order"] else None
        offsets = at(arguments["offsets"], torch.int64, (domains + 1,))
        return Arguments(input, grad_output, offsets, queries, panels=None, order=order, grad_weight=None)


@pytest.fixture(params=[(9, 0), (8, 0)], ids=["wgmma", "mma"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Module]:
    """The stand-in, on a GPU of this capability whose memory is the host's."""
    stand_in = Module()
    monkeypatch.setattr(native, "module", stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.delenv(exact.KERNEL_VARIABLE, raising=False)
    yield stand_in
    device_checks.raise_on_device_errors()


SIZES = [30, 0, 1, 66]


def make_call(
    dtype: torch.dtype, queries: torch.dtype, *, height: int = 136, width: int = 24, sizes: list[int] = SIZES,
    tasks: int = 3, shuffled: bool = False,
) -> Arguments:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    rows = sum(sizes)
    # Integers: sums are exact in every dtype and order.
    input, grad_output, tensors = (
        torch.randint(-3, 4, shape, generator=generator)
        for shape in ((rows, width), (rows, height), (tasks, height, width))
    )
    return Arguments(
        input=input.to(dtype), grad_output=grad_output.to(dtype), offsets=torch.tensor([0, *sizes]).cumsum(0),
        queries=tensors.to(queries), panels=None,
        order=torch.randperm(rows, generator=generator) if shuffled else None, grad_weight=None,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shuffled", [False, True], ids=["sorted", "ordered"])
def test_the_exact_kernel_gets_what_it_reads(
    module: Module, dtype: torch.dtype, queries: torch.dtype, shuffled: bool
) -> None:
    call = make_call(dtype, queries, shuffled=shuffled)
    right = reference.group_influence(call)
    assert torch.equal(exact.fused(call), right)
    packed = call._replace(panels=cuda.pack_queries(call.queries))
    module.calls.clear()
    assert torch.equal(exact.fused(packed), right)
    assert module.calls == ["group_influence"], "packed queries were packed again"


def test_queries_of_any_strides_are_packed(module: Module) -> None:
    call = make_call(torch.bfloat16, torch.bfloat16)
    for queries in (call.queries.mT.contiguous().mT, call.queries.repeat_interleave(2, dim=2)[..., ::2]):
        assert torch.equal(exact.fused(call._replace(queries=queries)), reference.group_influence(call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "rows-apart", "transposed"])
@pytest.mark.parametrize("tasks", [3, 0])
def test_the_total_is_added_where_it_belongs(module: Module, dtype: torch.dtype, layout: str, tasks: int) -> None:
    call = make_call(torch.bfloat16, torch.bfloat16, tasks=tasks, shuffled=True)
    height, width = call.queries.shape[1:]
    before = torch.arange(height * width).remainder(5).view(height, width).to(dtype)
    grad_weight = {
        "contiguous": lambda: before.clone(),
        "rows-apart": lambda: torch.full((height, width + 7), 9.0, dtype=dtype)[:, :width].copy_(before),
        "transposed": lambda: before.T.contiguous().T,
    }[layout]()
    version = grad_weight._version
    values = exact.fused(call._replace(grad_weight=grad_weight))
    assert torch.equal(values, reference.group_influence(call))
    total = call.grad_output.double().T @ call.input.double()
    assert torch.equal(grad_weight, (before.double() + total).to(dtype))
    assert grad_weight._version > version


@pytest.mark.parametrize("rows", [1, 700, 5000])
def test_workspaces_are_as_large_as_planned(module: Module, rows: int) -> None:
    """The stand-in writes all of them."""
    call = make_call(torch.bfloat16, torch.bfloat16, height=8, width=16, sizes=[rows // 2, rows - rows // 2])
    grad_weight = torch.zeros(8, 16)
    values = exact.fused(call._replace(grad_weight=grad_weight))
    assert torch.equal(values, reference.group_influence(call))


@pytest.mark.parametrize("stride", [0, 3, 8])
def test_a_single_row_of_any_stride(module: Module, stride: int) -> None:
    call = make_call(torch.bfloat16, torch.bfloat16, sizes=[1])
    call = call._replace(input=call.input.as_strided(call.input.shape, (stride, 1)))
    assert native.are_aligned(call.input)
    assert torch.equal(exact.fused(call), reference.group_influence(call))


@pytest.mark.parametrize("cheapest", ["fused", "two_pass"])
def test_only_bfloat16_queries_may_meet_rounded_gradients(
    module: Module, monkeypatch: pytest.MonkeyPatch, cheapest: str
) -> None:
    costs = GpuCosts(fused=float(cheapest != "fused"), two_pass=float(cheapest == "fused"))
    monkeypatch.setattr(exact, "count_gpu_costs", lambda *sizes, **how: costs)
    for queries, kernel in ((torch.bfloat16, cheapest == "fused"), (torch.float32, True)):
        module.calls.clear()
        cuda.group_influence(make_call(torch.bfloat16, queries))
        assert ("group_influence" in module.calls) == kernel


def test_panels_of_another_kernel_or_device_are_not_read(module: Module) -> None:
    call = make_call(torch.bfloat16, torch.bfloat16)
    right = reference.group_influence(call)
    panels = cuda.pack_queries(call.queries)
    for other in (panels[:, :1], panels.float(), panels.to("meta"), panels.flip(0).mT.contiguous().mT):
        assert torch.equal(exact.fused(call._replace(panels=other)), right)


@pytest.mark.parametrize("kind", ["countsketch", "rademacher", "gaussian", "pair"])
@pytest.mark.parametrize("dims", [(16, 64), (128, 32)])
@pytest.mark.parametrize("shuffled", [False, True], ids=["sorted", "ordered"])
def test_the_projected_kernel_gets_what_it_reads(
    module: Module, kind: str, dims: tuple[int, int], shuffled: bool
) -> None:
    call = make_call(torch.bfloat16, torch.float32, height=20, width=36, shuffled=shuffled)
    k_out, k_in = dims
    if kind == "pair":
        factors = torch.randn(k_out, 20).bfloat16().mT.contiguous().mT, torch.randn(k_in, 36).bfloat16()
        scale = 1.0
    else:
        projection = ops.LayerProjection(20, 36, k_out=k_out, k_in=k_in, kind=kind)
        factors, scale = (projection.output_factor, projection.input_factor), projection.scale
    queries = torch.randint(-3, 4, (3, k_out, k_in)).float().mT.contiguous().mT
    input, grad_output = (  # rows begin at multiples of 16 bytes and end in between
        torch.nn.functional.pad(rows, (0, 4))[:, : rows.shape[1]] for rows in (call.input, call.grad_output)
    )
    arguments = ProjectedArguments(input, grad_output, call.offsets, queries, *factors, scale, call.order)
    assert cuda.projected.refusal(arguments) is None
    torch.testing.assert_close(
        cuda.projected_group_influence(arguments), reference.projected_group_influence(arguments)
    )
    units = arguments._replace(queries=torch.eye(k_out * k_in).view(-1, k_out, k_in))
    right = reference.projected_group_influence(units).T.reshape(-1, k_out, k_in)
    torch.testing.assert_close(cuda.projected_domain_gradients(arguments), right.float())
    assert module.calls.count("write_factor") == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_packing_is_traced_with_the_shape_that_it_has(module: Module, dtype: torch.dtype) -> None:
    """As torch.compile sees it: on tensors of a GPU that hold nothing."""
    panels = cuda.pack_queries(torch.zeros(3, 136, 24, dtype=dtype))
    with FakeTensorMode():
        queries = torch.empty(3, 136, 24, dtype=dtype, device="cuda")
        traced = dispatch.empty_panels(queries)
        assert traced.device.type == "cuda"
    assert (traced.shape, traced.dtype) == (panels.shape, panels.dtype)
