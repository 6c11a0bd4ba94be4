"""Peak memory of a call, as the operating system sees it, in a fresh process."""

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
    """Call the function and return the peak growth of resident memory, in bytes.

    Returns
    -------
    dict
        ``growth`` (peak during the call minus resident memory before) and ``peak`` (of the whole process).

    Raises
    ------
    OSError
        If the kernel does not reset the peak; see `why_not`.
    """
    _RESET.write_text("5")  # VmHWM restarts at the present resident memory
    before = _kilobytes("VmRSS")
    function()
    peak = _kilobytes("VmHWM")
    return {"growth": max(0, peak - before) * 1024, "peak": peak * 1024}


def in_fresh_process(module: str, request: dict[str, Any]) -> dict[str, Any]:
    """Run ``python -m module`` with the request as JSON on stdin, and return the JSON that it prints.

    Raises
    ------
    RuntimeError
        If it fails, with the end of its error output.
    """
    # Return freed memory to the system at once. Otherwise a call could reuse memory of its preparation unseen.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=600,
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
