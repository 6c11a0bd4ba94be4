"""NVIDIA's own tools on our kernels: compute-sanitizer and ncu; where they are missing, that is what is recorded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import Device
from benchmarks.gpu.methods import AUTOMATIC, gpu_methods
from tikmix_fast.benchmarking.ops import Case, make_layer

__all__ = ["PROFILED", "TINY_PROFILED", "run_profile", "run_sanitizer"]

_ERRORS_FOUND = 86
_KEPT = 4000
PROFILED = Case(16384, 4096, 4096, 26, 9, "bfloat16")
TINY_PROFILED = Case(96, 40, 24, 3, 2, "bfloat16")

Save = Callable[[dict[str, Any]], object]


def _interpreter() -> list[str]:
    return [sys.executable, *(["-S"] if sys.flags.no_site else [])]


def run_sanitizer(content: dict[str, Any], seconds: float, save: Save, *, root: Path, tool: str) -> None:
    """Run tests/gpu/sanitize_cases.py under one of compute-sanitizer's tools.

    Saves ``clean`` (bool) and the end of the ``output``, or ``why_not``.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        content["why_not"] = "compute-sanitizer is not on PATH"
    else:
        command = [program, "--tool", tool, f"--error-exitcode={_ERRORS_FOUND}", "--print-limit=10"]
        found = _run([*command, *_interpreter(), str(root / "tests/gpu/sanitize_cases.py")], seconds)
        status = found.pop("status")
        content.update(found)
        if "Device not supported" in found["output"]:
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
        return {"status": None, "why_not": f"stopped after {seconds:.0f} s", "output": text[-_KEPT:]}
    return {"status": done.returncode, "output": done.stdout[-_KEPT:]}


def run_profile(device: Device, content: dict[str, Any], seconds: float, save: Save, *, folder: Path) -> None:
    """Profile our kernels at one shape: by torch's profiler, and by ncu where it is there.

    Writes the whole reports into ``folder``, and saves torch's table and the numbers that ncu gives for each kernel.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    case = TINY_PROFILED if device.where.type == "cpu" else PROFILED
    layer = make_layer(case, 0, device.where)
    died = content.pop("trying", None)
    left_out = content.setdefault("left_out", {})
    if died:
        left_out[died["what"]] = died.get("why", "the process died")
    runs = {}
    for name, method in gpu_methods().items():
        if method.ours and name not in left_out:
            content["trying"] = {"case": case.name, "what": name}
            save(content)
            reason = method.refusal(layer)
            if reason is None:
                run = method.prepare(layer)
                run()
                device.synchronize()
                runs[name] = run
            else:
                left_out[name] = reason
    content.pop("trying", None)
    activity = ProfilerActivity.CPU if device.where.type == "cpu" else ProfilerActivity.CUDA
    with profile(activities=[activity]) as recorded:
        for run in runs.values():
            run()
        device.synchronize()
    averages = recorded.key_averages()
    content["case"] = case.name
    content["kernels"] = [
        {"name": each.key[:120], "calls": each.count, "seconds": float(each.self_device_time_total) / 1e6}
        for each in sorted(averages, key=lambda each: -each.self_device_time_total)[:25]
    ]
    (folder / "profile-torch.txt").write_text(averages.table(sort_by="self_device_time_total", row_limit=40))
    save(content)
    del runs, layer
    if device.where.type == "cuda":
        torch.cuda.empty_cache()
    ncu = shutil.which("ncu")
    if ncu is None:
        content["ncu"] = {"why_not": "ncu is not on PATH"}
    else:
        command = [
            ncu, "--clock-control", "none", "--profile-from-start", "off", "--section", "SpeedOfLight", "--section",
            "LaunchStats", "--section", "Occupancy", "--section", "MemoryWorkloadAnalysis", "--launch-count", "60",
            *_interpreter(), "-m", __name__,
        ]  # fmt: skip
        found = _run_whole(command, seconds, folder / "profile-ncu.txt")
        content["ncu"] = found
    save(content)


def _run_whole(command: list[str], seconds: float, path: Path) -> dict[str, Any]:
    with path.open("w") as file:
        try:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            return {"why_not": f"stopped after {seconds:.0f} s"}
    text = path.read_text(errors="replace")
    if done.returncode or "==ERROR==" in text:
        return {"why_not": text[-_KEPT:]}
    return {"kernels": _read_ncu(text)}


_READ = (
    "Duration",
    "Compute (SM) Throughput",
    "DRAM Throughput",
    "L2 Cache Throughput",
    "Registers Per Thread",
    "Achieved Occupancy",
)


def _read_ncu(text: str) -> list[dict[str, str]]:
    """Read name and a few numbers of every kernel from ncu's text.

    Examples
    --------
    >>> _read_ncu("  k(float *) (1, 1, 1)x(32, 1, 1), Context 1, Stream 7\\n    Duration   us   2.5")
    [{'kernel': 'k(float *)', 'Duration': '2.5 us'}]
    """
    kernels: list[dict[str, str]] = []
    for line in text.splitlines():
        if ", Context " in line and ")x(" in line:
            kernels.append({"kernel": line.strip().split(" (")[0][:120] if " (" in line else line.strip()[:120]})
        words = line.split()
        name = next((each for each in _READ if line.strip().startswith(each)), None)
        if name and kernels and len(words) > len(name.split()):
            unit, value = (words[-2], words[-1]) if len(words) > len(name.split()) + 1 else ("", words[-1])
            kernels[-1].setdefault(name, f"{value} {unit}".strip())
    return kernels


def _profiled_program() -> None:
    """Run our kernels once between the marks that ncu waits for; the program that it starts."""
    import torch

    layer = make_layer(PROFILED, 0, "cuda")
    methods = gpu_methods()
    forced = [methods[f"{AUTOMATIC}, {each}"] for each in ("cuda fused", "triton fused", "triton two-pass")]
    runs = [method.prepare(layer) for method in forced if method.refusal(layer) is None]
    for run in runs:
        run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for run in runs:
        run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    _profiled_program()
