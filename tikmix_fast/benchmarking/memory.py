"""How much memory a call takes at its peak, seen by the operating system in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["in_fresh_process", "peak_growth", "why_not"]

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def why_not() -> str | None:
    """Return why peaks cannot be measured here, or None."""
    return None if _STATUS.exists() and _RESET.exists() else "needs Linux: /proc/self/clear_refs resets the peak"


def peak_growth(function: Callable[[], object]) -> dict[str, int]:
    """Call the function and return how far resident memory rose above what was there before, in bytes.

    Returns
    -------
    dict
        ``growth`` (peak during the call less what was resident before) and ``peak`` (of the whole process).

    Raises
    ------
    OSError
        Where the kernel does not let the peak be reset; see `why_not`.
    """
    _RESET.write_text("5")  # VmHWM starts anew at what is resident now
    before = _kilobytes("VmRSS")
    function()
    peak = _kilobytes("VmHWM")
    return {"growth": max(0, peak - before) * 1024, "peak": peak * 1024}


def in_fresh_process(module: str, request: dict[str, Any], timeout: float = 600) -> dict[str, Any]:
    """Run ``python -m module`` with the request as JSON on stdin, and return the JSON that it prints.

    Raises
    ------
    RuntimeError
        If it fails, with the end of what it wrote.
    """
    # What is freed goes back to the system at once: else a call could fill what its preparation left behind, unseen.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"python -m {module} failed: {done.stderr.strip()[-500:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _kilobytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no {field}")
