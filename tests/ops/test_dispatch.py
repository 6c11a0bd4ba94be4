"""Which backend runs a call, and what a request that cannot run is told."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tikmix_fast import ops
from tikmix_fast.ops import dispatch
from tikmix_fast.ops.backends.cpu import native

ARGUMENTS = (torch.ones(2, 1), torch.ones(2, 1), torch.tensor([0, 2]), torch.ones(1, 1, 1))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that ran, in order."""
    names: list[str] = []

    def spy(name: str, backend: dispatch._Backend) -> SimpleNamespace:
        def run(arguments: dispatch.Arguments) -> Tensor:
            names.append(name)
            return torch.zeros(arguments.queries.shape[0], arguments.offsets.shape[0] - 1, dtype=torch.float64)

        return SimpleNamespace(unavailable=lambda: None, refusal=backend.refusal, group_influence=run)

    monkeypatch.setattr(
        dispatch, "_BACKENDS", {name: spy(name, backend) for name, backend in dispatch._BACKENDS.items()}
    )
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.delenv("TIKMIX_FAST_BACKEND", raising=False)
    return names


@pytest.fixture
def info_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="tikmix_fast.ops"):
        yield caplog


def test_the_order_of_choice(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ops.group_influence(*ARGUMENTS)
    monkeypatch.setenv("TIKMIX_FAST_BACKEND", "reference")
    ops.group_influence(*ARGUMENTS)
    with ops.use_backend("cpu"):
        ops.group_influence(*ARGUMENTS)
        ops.group_influence(*ARGUMENTS, backend="reference")
        with ops.use_backend("reference"):
            ops.group_influence(*ARGUMENTS)
        ops.group_influence(*ARGUMENTS)
    ops.group_influence(*ARGUMENTS)
    assert ran == ["cpu", "reference", "cpu", "reference", "reference", "cpu", "reference"]


def test_use_backend_ends_when_the_body_raises(ran: list[str]) -> None:
    with pytest.raises(KeyError), ops.use_backend("reference"):
        raise KeyError
    ops.group_influence(*ARGUMENTS)
    assert ran == ["cpu"]


def test_an_empty_environment_variable_is_no_choice(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKMIX_FAST_BACKEND", "")
    ops.group_influence(*ARGUMENTS)
    assert ran == ["cpu"]


def test_unknown_names_are_refused_with_their_source(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = "one of reference, cpu, triton, cuda; got 'gpu'"
    with pytest.raises(ValueError, match=f"backend must be {names}"):
        ops.group_influence(*ARGUMENTS, backend="gpu")
    with pytest.raises(ValueError, match=f"backend must be {names}"), ops.use_backend("gpu"):
        pass
    monkeypatch.setenv("TIKMIX_FAST_BACKEND", "gpu")
    with pytest.raises(ValueError, match=f"TIKMIX_FAST_BACKEND must be {names}"):
        ops.group_influence(*ARGUMENTS)
    assert ran == []


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_that_cannot_run_says_so_and_lists_the_others(
    ran: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(dispatch._BACKENDS[name], "unavailable", lambda: "not on this machine")
    with (
        pytest.raises(RuntimeError, match=f"the backend '{name}' asked for by use_backend") as caught,
        ops.use_backend(name),
    ):
        ops.group_influence(*ARGUMENTS)
    message = str(caught.value)
    assert "reference: usable" in message
    assert "cpu: usable" in message
    assert f"{name}: not on this machine" in message
    assert ran == []


@pytest.mark.parametrize("which", [0, 1, 3], ids=["input", "grad_output", "queries"])
def test_a_dtype_the_native_kernel_lacks_falls_back_once_aloud(
    ran: list[str], info_log: pytest.LogCaptureFixture, which: int
) -> None:
    for rows in (2, 2, 3):  # another number of rows is no news
        arguments = [torch.ones(rows, 1), torch.ones(rows, 1), torch.tensor([0, rows]), torch.ones(1, 1, 1)]
        arguments[which] = arguments[which].double()
        ops.group_influence(*arguments)
    assert ran == ["reference"] * 3
    assert len(info_log.messages) == 1
    assert "backend cpu is passed over" in info_log.messages[0]
    assert "none of float32, bfloat16 and float16" in info_log.messages[0]

    with pytest.raises(RuntimeError, match="backend 'cpu' asked for by backend cannot run this call") as caught:
        ops.group_influence(*arguments, backend="cpu")
    assert "none of float32, bfloat16 and float16" in str(caught.value)


def test_a_native_module_that_does_not_load_is_a_reason(
    ran: list[str], info_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "missing", "the native module tikmix_fast._cpu cannot be imported (why)")
    monkeypatch.setattr(dispatch._BACKENDS["cpu"], "unavailable", native.unavailable)
    assert "(why)" in str(ops.available_backends()["cpu"])
    ops.group_influence(*ARGUMENTS)
    assert ran == ["reference"]
    assert "(why)" in info_log.messages[0]


def test_available_backends_gives_a_reason_for_each_it_cannot_use() -> None:
    reasons = ops.available_backends()
    assert list(reasons) == ["reference", "cpu", "triton", "cuda"]
    assert reasons["reference"] is None
    if not torch.cuda.is_available():
        assert "TIKMIX_FAST_CUDA" in str(reasons["cuda"]) or "built for" in str(reasons["cuda"])


def test_triton_runs_cpu_tensors_in_its_interpreter_only() -> None:
    script = (
        "import torch\n"
        "from tikmix_fast import ops\n"
        "print(ops.available_backends()['triton'])\n"
        "try:\n"
        "    one = torch.ones(1, 1)\n"
        "    ops.group_influence(one, one, torch.tensor([0, 1]), one[None], backend='triton')\n"
        "except RuntimeError as error:\n"
        "    print('triton: ' in str(error))\n"
    )
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=plain, capture_output=True, text=True, check=True)
    reason, listed = done.stdout.splitlines()
    assert listed == "True"
    if not torch.cuda.is_available():
        assert "set TRITON_INTERPRET=1" in reason


def test_the_public_names() -> None:
    names = "LayerProjection PackedQueries available_backends group_influence pack_queries projected_domain_gradients"
    assert set(ops.__all__) == set(f"{names} projected_group_influence projection_stderr use_backend".split())
