"""The report on the environment: complete, plain JSON, and unbroken by what is broken."""

from __future__ import annotations

import json
import platform

import pytest
import torch

from tikmix_fast import __version__, ops
from tikmix_fast.report import environment


def test_it_tells_versions_machine_and_backends() -> None:
    found = environment.describe_environment()
    assert json.loads(json.dumps(found)) == found
    assert (found["tikmix_fast"], found["python"]) == (__version__, platform.python_version())
    assert found["packages"]["torch"] == torch.__version__
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["backends"] == ops.available_backends()


def test_a_probe_that_fails_says_why_and_spares_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("no such thing")

    monkeypatch.setattr(ops, "available_backends", fail)
    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no_such_package"))
    found = environment.describe_environment()
    assert found["backends"] == "unknown (OSError: no such thing)"
    assert found["packages"]["no_such_package"].startswith("unknown (PackageNotFoundError")
    assert found["packages"]["torch"] == torch.__version__


def test_variables_that_are_set_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKMIX_FAST_BACKEND", "reference")
    monkeypatch.delenv("TIKMIX_FAST_CPU_ISA", raising=False)
    variables = environment.describe_environment()["variables"]
    assert variables["TIKMIX_FAST_BACKEND"] == "reference"
    assert "TIKMIX_FAST_CPU_ISA" not in variables
