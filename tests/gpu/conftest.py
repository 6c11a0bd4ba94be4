"""Fixtures of the tests that need a GPU; ``python -m benchmarks.gpu`` runs them there.

TIKMIX_FAST_GPU_BACKENDS   backends to test, separated by commas (triton,cuda)
TIKMIX_FAST_GPU_REHEARSAL  run on the CPU what runs there, to check the tests themselves
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.kernels import check_group_influence
from tikmix_fast import ops, testing
from tikmix_fast.ops.backends import triton
from tikmix_fast.ops.backends.cuda import exact as cuda
from tikmix_fast.ops.common.gpu_cost import GpuCosts

# cuBLAS reads this for its first handle; without it, torch warns in every deterministic test.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

REHEARSAL = bool(os.environ.get("TIKMIX_FAST_GPU_REHEARSAL"))
BACKENDS = tuple(filter(None, os.environ.get("TIKMIX_FAST_GPU_BACKENDS", "triton,cuda").split(",")))
REQUIRED = os.environ.get("TIKMIX_FAST_REQUIRE", "").split(",")
NO_GPU = "no CUDA device: `python -m benchmarks.gpu` runs these tests on a machine with a GPU"


class _SkippedFile(pytest.Module):
    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip(NO_GPU)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip whole files where there is no GPU: one line for each, not one for every test."""
    if REHEARSAL or torch.cuda.is_available():
        return None
    return _SkippedFile.from_parent(parent, path=module_path)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU."""
    if REHEARSAL:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The GPU, for tests without a counterpart on a CPU."""
    if device.type != "cuda":
        pytest.skip("the rehearsal on a CPU has no streams, graphs or asynchronous errors")
    return device


def _require(name: str) -> None:
    reason = ops.available_backends()[name]
    if reason is not None and name in REQUIRED:
        pytest.fail(f"TIKMIX_FAST_REQUIRE names {name}, but it cannot be used: {reason}")
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every GPU backend in turn; the CUDA backend with its own kernels only."""
    _require(request.param)
    # Otherwise some calls would go to the vendor's grouped product, by counting.
    monkeypatch.setattr(cuda, "count_gpu_costs", lambda *sizes, **how: GpuCosts(fused=0.0, two_pass=1.0))
    return str(request.param)


WAYS = {
    "vendor": ("cuda", cuda, GpuCosts(fused=1.0, two_pass=0.0)),
    "triton-fused": ("triton", triton, GpuCosts(fused=0.0, two_pass=1.0)),
    "triton-two-pass": ("triton", triton, GpuCosts(fused=1.0, two_pass=0.0)),
}


@pytest.fixture(params=[name for name, (backend, *_) in WAYS.items() if backend in BACKENDS])
def way(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend of a way that it would choose by counting; every way in turn, forced."""
    backend, module, costs = WAYS[request.param]
    _require(backend)
    monkeypatch.setattr(module, "count_gpu_costs", lambda *sizes, **how: costs)
    return backend


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, which shows outputs that nobody wrote."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Call(NamedTuple):
    """The tensors of one call, with its right results in float64."""

    input: Tensor
    grad_output: Tensor
    offsets: Tensor
    queries: Tensor
    gradients: Tensor
    values: Tensor

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self[:4]

    def check(self, values: Tensor, grad_weight: Tensor | None = None, before: Tensor | None = None) -> None:
        """Check the values, and the sum with ``before``, against the error budget of every backend."""
        check_group_influence(*self.arguments, values=values, grad_weight=grad_weight, before=before)


class MakeCall:
    """Draws calls on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(
        self, height: int, width: int, sizes: list[int], tasks: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> Call:
        generator = torch.Generator().manual_seed(sum(sizes) * 1000 + height + width + seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, dtype)

        input, grad_output = normal(sum(sizes), width), normal(sum(sizes), height)
        queries = normal(tasks, height, width) / 64  # else influence exceeds the range of float16
        offsets = torch.tensor([0, *sizes]).cumsum(0)
        gradients = testing.domain_gradients(input, grad_output, offsets)
        values = torch.einsum("noi,moi->nm", queries.double(), gradients)
        return Call(input, grad_output, offsets.to(self.device), queries, gradients, values)


@pytest.fixture
def make_call(device: torch.device) -> MakeCall:
    return MakeCall(device)


def takes(backend: str, dtype: torch.dtype) -> bool:
    """Return whether a backend has a kernel for rows of this dtype; the native CUDA kernels read 16 bits."""
    return backend != "cuda" or dtype != torch.float32


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def dtype(request: pytest.FixtureRequest, backend: str) -> torch.dtype:
    """Every dtype of rows that the backend takes."""
    if not takes(backend, request.param):
        pytest.skip(f"the kernels of {backend} take no {request.param}; another backend does")
    return request.param
