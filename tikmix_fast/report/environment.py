"""The environment that makes a result. Every probe stands alone, so a broken installation still gets a report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tikmix_fast._version import __version__

__all__ = ["describe_environment"]

_PACKAGES = ("torch", "numpy", "scipy", "lightgbm", "triton", "matplotlib", "typer", "rich", "safetensors")
_VARIABLES = ("TIKMIX_FAST_BACKEND", "TIKMIX_FAST_CPU_ISA", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")


def describe_environment() -> dict[str, Any]:
    """Return versions, machine, backends and commit as plain JSON types. A probe that fails returns its reason.

    Returns
    -------
    dict
        ``tikmix_fast`` and ``python`` (versions), ``packages`` (name to version), ``machine`` (name to text or number),
        ``backends`` (name to None if usable, else the reason), ``commit`` (of a source checkout), ``variables``
        (environment variables with a value).

    Examples
    --------
    >>> describe_environment()["backends"]["reference"] is None
    True
    """
    return {
        "tikmix_fast": __version__,
        "python": platform.python_version(),
        "packages": {name: _probe(partial(importlib.metadata.version, name)) for name in _PACKAGES},
        "machine": {
            "system": platform.platform(),
            "processor": _probe(_processor),
            "cores": os.cpu_count(),
            "threads": _probe(_threads),
            "torch CPU capability": _probe(_torch_capability),
            "instruction sets": _probe(_instruction_sets),
            "GPU": _probe(_gpu),
        },
        "backends": _probe(_backends),
        "commit": _probe(_commit),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _probe(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:  # a a report on a broken installation must not break
        return f"unknown ({type(error).__name__}: {error})"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _torch_capability() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()


def _instruction_sets() -> str:
    import torch  # noqa: F401  the native module needs the OpenMP runtime that torch brings

    from tikmix_fast import _cpu

    return ", ".join(_cpu.instruction_sets())


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def _backends() -> dict[str, str | None]:
    from tikmix_fast import ops

    return ops.available_backends()


def _commit() -> str | None:
    """Return the commit of the checkout with this file, and whether files differ from it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed package may lie inside a repository that has nothing to do with it.
        if not git("ls-files", Path(__file__).name):
            return None
        # A run writes its results there, and they do not change the program.
        changed = git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)benchmarks/results")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
