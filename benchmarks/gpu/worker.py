"""One job of benchmarks/gpu.py in a process of its own: after a device error, only another process can go on.

python -m benchmarks.gpu.worker JOB --content FILE --root TREE --seconds N

The file is what the job has so far. What it is about to try is written there first, under ``trying``, so that a process
that dies leaves behind what killed it; started again, the job leaves that out. Ends with status 3 where a device error
was noted properly and the rest needs another process.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import Device, find_device
from tikmix_fast import files

__all__ = ["AGAIN", "jobs_of"]

AGAIN = 3
_TOOLS = ("memcheck", "racecheck")


def jobs_of(part: str, root: Path, rehearse: bool = False) -> dict[str, dict[str, str]]:
    """Return the jobs of a part, which run at the same time, and what each is told by its environment."""
    if part != "tests":
        return {part: {}}
    backends = ("cpu",) if rehearse else ("triton", "cuda")
    jobs = {}
    for backend in backends:
        environment = {"TIKMIX_FAST_GPU_BACKENDS": backend, "TIKMIX_FAST_REQUIRE": backend}
        for path in sorted((root / "tests/gpu").glob("test_*.py")):
            jobs[f"{backend} {path.relative_to(root)}"] = environment
    if not rehearse:
        jobs["engine tests/influence/test_engine_cuda.py"] = {}
        jobs |= {tool: {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} for tool in _TOOLS}
    return jobs


def _describe(device: Device, rehearse: bool) -> dict[str, Any]:
    from tikmix_fast.report.environment import describe_environment

    return {"device": device.describe(), "environment": {**describe_environment(), "nvcc": _nvcc()}}


def _nvcc() -> str | None:
    try:
        done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release \S+, V(\S+)", done.stdout)
    return found[1] if found else None


def _work(job: str, content: dict[str, Any], save: Any, arguments: argparse.Namespace) -> bool:
    """Do the job; return whether the rest of it needs another process."""
    root, seconds, rehearse = arguments.root, arguments.seconds, arguments.rehearse
    if job in _TOOLS:
        from benchmarks.gpu.tools import run_sanitizer

        run_sanitizer(content, seconds, save, root=root, tool=job)
        return False
    if " " in job:  # a group of tests, and a file
        from benchmarks.gpu.suite import run_suite_of_tests

        environment = {"TIKMIX_FAST_GPU_REHEARSAL": "1"} if rehearse else {}
        return run_suite_of_tests(content, seconds, save, root=root, paths=[job.split(" ")[1]], environment=environment)
    device = find_device(rehearse)
    match job:
        case "describe":
            content.update(_describe(device, rehearse))
            save(content)
        case "ops":
            from benchmarks.gpu.ops import GPU_CASES, TINY_GPU_CASES, run_ops

            run_ops(device, content, seconds, save, TINY_GPU_CASES if rehearse else GPU_CASES)
        case "engine":
            from benchmarks.gpu.engine import GPU_STEPS, TINY_GPU_STEPS, run_engine

            run_engine(device, content, seconds, save, TINY_GPU_STEPS if rehearse else GPU_STEPS)
        case "profile":
            from benchmarks.gpu.tools import run_profile

            run_profile(device, content, seconds, save, folder=arguments.content.parent)
        case _:
            raise ValueError(f"job must be one that jobs_of returns, or describe; got {job!r}")
    return False


def main() -> None:
    """Do one job, and leave behind what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--content", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    path: Path = arguments.content
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def save(content: dict[str, Any]) -> None:
        files.write_json(path, content)

    try:
        again = _work(arguments.job, content, save, arguments)
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        if "trying" in content:
            content["trying"]["why"] = why
        else:
            content["failure"] = why
        save(content)
        raise
    if again:
        sys.exit(AGAIN)


if __name__ == "__main__":
    main()
