"""NVIDIA's compute-sanitizer on our kernels; where it is missing, the result says so."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.gpu.progress import Save, interpreter

__all__ = ["run_sanitizer"]

_ERRORS_FOUND = 86
_LONGEST = 4000


def run_sanitizer(content: dict[str, Any], seconds: float, save: Save, *, root: Path, tool: str) -> None:
    """Run tests/gpu/sanitize_cases.py under one of compute-sanitizer's tools.

    Saves ``clean`` (bool) and the end of the ``output``, or the reason as ``why_not``.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        content["why_not"] = "compute-sanitizer is not on PATH"
    else:
        command = [program, "--tool", tool, f"--error-exitcode={_ERRORS_FOUND}", "--print-limit=10"]
        facts = _run([*command, *interpreter(), str(root / "tests/gpu/sanitize_cases.py")], seconds)
        status = facts.pop("status")
        content.update(facts)
        if "Device not supported" in facts["output"]:
            content["why_not"] = "compute-sanitizer does not support this device or driver"
        elif status is not None:
            content["clean"] = status == 0
    save(content)


def _run(command: list[str], seconds: float) -> dict[str, Any]:
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=max(seconds, 1),
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        return {"status": None, "why_not": f"stopped after {seconds:.0f} s", "output": text[-_LONGEST:]}
    return {"status": done.returncode, "output": done.stdout[-_LONGEST:]}
