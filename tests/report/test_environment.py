"""The report on the environment: complete, plain JSON, and unbroken by what is broken."""

from __future__ import annotations

import json
import platform

import pytest
import torch
from packaging.version import Version

from tikmix_fast import __version__, ops
from tikmix_fast.report import environment


def assert_is_torch(version: str) -> None:
    """The installed distribution and the module name the same release; either may add a label of its build."""
    assert Version(version).public == Version(torch.__version__).public


def test_it_tells_versions_machine_and_backends() -> None:
    report = environment.describe_environment()
    assert json.loads(json.dumps(report)) == report
    assert (report["tikmix_fast"], report["python"]) == (__version__, platform.python_version())
    assert_is_torch(report["packages"]["torch"])
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert report["backends"] == ops.available_backends()


def test_a_probe_that_fails_says_why_and_spares_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("no such thing")

    monkeypatch.setattr(ops, "available_backends", fail)
    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no_such_package"))
    report = environment.describe_environment()
    assert report["backends"] == "unknown (OSError: no such thing)"
    assert report["packages"]["no_such_package"].startswith("unknown (PackageNotFoundError")
    assert_is_torch(report["packages"]["torch"])


def test_variables_that_are_set_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKMIX_FAST_BACKEND", "reference")
    monkeypatch.delenv("TIKMIX_FAST_CPU_ISA", raising=False)
    variables = environment.describe_environment()["variables"]
    assert variables["TIKMIX_FAST_BACKEND"] == "reference"
    assert "TIKMIX_FAST_CPU_ISA" not in variables
