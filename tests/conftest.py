from __future__ import annotations

import os
from collections.abc import Iterator

# OpenMP reads this when torch is loaded. Waiting threads that spin make a busy machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Read when the kernels are first imported: without a GPU, Triton's interpreter runs them on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tikmix_fast import ops
from tikmix_fast.demo.corpora import Corpora, Task
from tikmix_fast.demo.gpt import GPTSettings
from tikmix_fast.demo.settings import DemoSettings
from tikmix_fast.ops.backends import cpu

# Programs that tests start as processes of their own.
collect_ignore = ["influence/ranks_worker.py", "influence/sharded_worker.py", "package/fuzz_readers.py"]

BACKENDS = ("reference", "cpu", "triton")
INSTRUCTION_SETS = ("generic", "avx2", "avx512", "avx512_bf16")
REQUIRED = tuple(filter(None, os.environ.get("TIKMIX_FAST_REQUIRE", "").split(",")))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    reasons = ops.available_backends()
    for name in REQUIRED:
        if name not in reasons:
            raise pytest.UsageError(f"TIKMIX_FAST_REQUIRE must name some of {', '.join(reasons)}; got {name!r}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --full"))


def require_backend(name: str) -> None:
    """Skip where a backend is missing, or fail where TIKMIX_FAST_REQUIRE names it."""
    reason = ops.available_backends()[name]
    if reason is None:
        return
    if name in REQUIRED:
        pytest.fail(f"TIKMIX_FAST_REQUIRE names {name}, but it cannot be used: {reason}")
    pytest.skip(f"{name}: {reason}")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn."""
    require_backend(request.param)
    return request.param


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set of the native kernel in turn, forced."""
    require_backend("cpu")
    if request.param not in cpu.instruction_sets():
        pytest.skip(f"this machine or build has no {request.param}")
    monkeypatch.setenv(cpu.INSTRUCTION_SET_VARIABLE, request.param)
    return request.param


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that an output nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def corpora() -> Corpora:
    """Two real kinds of text and noise, small enough for a training run in a test."""
    random = np.random.default_rng(0)

    def words(vocabulary: list[str], count: int) -> np.ndarray:
        return np.frombuffer(" ".join(random.choice(vocabulary, count)).encode(), dtype=np.uint8)

    prose = ["the", "cat", "sat", "mat", "on", "a", "and", "dog", "ran"]
    code = ["def", "x=1;", "(y)", "if:", "==", "{}", "[0]", "+="]
    noise = random.integers(0, 256, 4000).astype(np.uint8)
    return Corpora(
        domains={"prose": words(prose, 1500), "code": words(code, 1500), "noise": noise},
        tasks={
            "prose": Task(True, words(prose, 400), words(prose, 400)),
            "code": Task(False, words(code, 400), words(code, 400)),
        },
        sources={"prose": "made up", "code": "made up", "noise": "random"},
        missing={},
    )


@pytest.fixture
def settings() -> DemoSettings:
    """A demonstration of seconds."""
    return DemoSettings(
        steps=24,
        stages=3,
        batch=4,
        model=GPTSettings(layers=1, heads=2, width=16, length=16),
        learning_rate=1e-2,
        warm_up=4,
        task_batches=4,
        task_rows=3,
        domain_batches=6,
        domain_rows=2,
        task_splits=2,
        evaluate_every=8,
        curve_rows=8,
    )
