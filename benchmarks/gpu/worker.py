"""One job of ``python -m benchmarks.gpu`` in a process of its own: a device error ends the process, not the run.

python -m benchmarks.gpu.worker JOB --content FILE --root TREE --seconds N

FILE holds the results so far. The job writes there what it is about to try, under ``trying``. If the process dies, the
next one finds what killed it and leaves that out. Exit status 3 means: the job noted a device error, and the rest
needs another process.
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
from benchmarks.gpu.progress import Save, in_one_line
from tikmix_fast import files

__all__ = ["AGAIN", "jobs_of"]

AGAIN = 3
_TOOLS = ("memcheck", "racecheck")


def jobs_of(part: str, root: Path, rehearse: bool = False) -> dict[str, dict[str, str]]:
    """Return the jobs of a part, which run at the same time, and the environment variables of each."""
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


def _describe(device: Device) -> dict[str, Any]:
    from tikmix_fast.report.environment import describe_environment

    return {"device": device.describe(), "environment": {**describe_environment(), "nvcc": _nvcc()}}


def _nvcc() -> str | None:
    try:
        done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.search(r"release \S+, V(\S+)", done.stdout)
    return version[1] if version else None


def _work(job: str, content: dict[str, Any], save: Save, arguments: argparse.Namespace) -> bool:
    """Do the job; return whether the rest of it needs another process."""
    root, seconds, rehearse = arguments.root, arguments.seconds, arguments.rehearse
    if job in _TOOLS:
        from benchmarks.gpu.sanitizer import run_sanitizer

        run_sanitizer(content, seconds, save, root=root, tool=job)
        return False
    if " " in job:  # a group of tests, and a file
        from benchmarks.gpu.suite import run_suite_of_tests

        environment = {"TIKMIX_FAST_GPU_REHEARSAL": "1"} if rehearse else {}
        return run_suite_of_tests(content, seconds, save, root=root, paths=[job.split(" ")[1]], environment=environment)
    device = find_device(rehearse)
    match job:
        case "describe":
            content.update(_describe(device))
            save(content)
        case "ops":
            from benchmarks.gpu.cases import GPU_CASES, TINY_GPU_CASES
            from benchmarks.gpu.ops import run_ops

            run_ops(device, content, seconds, save, TINY_GPU_CASES if rehearse else GPU_CASES)
        case "engine":
            from benchmarks.gpu.engine import GPU_STEPS, TINY_GPU_STEPS, run_engine

            run_engine(device, content, seconds, save, TINY_GPU_STEPS if rehearse else GPU_STEPS)
        case "profile":
            from benchmarks.gpu.profiles import run_profile

            run_profile(device, content, seconds, save, folder=arguments.content.parent)
        case _:
            raise ValueError(f"job must be describe or a job of jobs_of; got {job!r}")
    return False


def main() -> None:
    """Do one job and save what happened."""
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
        why = in_one_line(error)
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
