"""Profiles of our kernels: by torch's profiler, and by NVIDIA's ncu."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.device import Device
from benchmarks.gpu.methods import AUTOMATIC, gpu_methods
from benchmarks.gpu.progress import Save, interpreter, take_death
from tikmix_fast.benchmarking.ops import Case, make_layer

__all__ = ["PROFILED", "TINY_PROFILED", "run_profile"]

_LONGEST = 4000
PROFILED = Case(16384, 4096, 4096, 26, 9, "bfloat16")
TINY_PROFILED = Case(96, 40, 24, 3, 2, "bfloat16")


def run_profile(device: Device, content: dict[str, Any], seconds: float, save: Save, *, folder: Path) -> None:
    """Profile our kernels at one shape by torch's profiler, and by ncu where it is installed.

    Writes the whole reports into ``folder``; saves torch's table and ncu's numbers of each kernel.
    """
    case = TINY_PROFILED if device.where.type == "cpu" else PROFILED
    layer = make_layer(case, 0, device.where)
    death = take_death(content)
    left_out = content.setdefault("left_out", {})
    if death:
        left_out[death["what"]] = death["why"]
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
    content["case"] = case.name
    content["kernels"] = _profile_by_torch(device, list(runs.values()), folder / "profile-torch.txt")
    save(content)
    del runs, layer
    if device.where.type == "cuda":
        torch.cuda.empty_cache()
    content["ncu"] = _profile_by_ncu(seconds, folder / "profile-ncu.txt")
    save(content)


def _profile_by_torch(device: Device, runs: Sequence[Callable[[], object]], path: Path) -> list[dict[str, Any]]:
    activity = ProfilerActivity.CPU if device.where.type == "cpu" else ProfilerActivity.CUDA
    with profile(activities=[activity]) as recorded:
        for run in runs:
            run()
        device.synchronize()
    averages = recorded.key_averages()
    path.write_text(averages.table(sort_by="self_device_time_total", row_limit=40))
    return [
        {"name": each.key[:120], "calls": each.count, "seconds": float(each.self_device_time_total) / 1e6}
        for each in sorted(averages, key=lambda each: -each.self_device_time_total)[:25]
    ]


def _profile_by_ncu(seconds: float, path: Path) -> dict[str, Any]:
    ncu = shutil.which("ncu")
    if ncu is None:
        return {"why_not": "ncu is not on PATH"}
    command = [
        ncu, "--clock-control", "none", "--profile-from-start", "off", "--section", "SpeedOfLight", "--section",
        "LaunchStats", "--section", "Occupancy", "--section", "MemoryWorkloadAnalysis", "--launch-count", "60",
        *interpreter(), "-m", __name__,
    ]  # fmt: skip
    with path.open("w") as file:
        try:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            return {"why_not": f"stopped after {seconds:.0f} s"}
    text = path.read_text(errors="replace")
    if done.returncode or "==ERROR==" in text:
        return {"why_not": text[-_LONGEST:]}
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
    """Read the name and a few numbers of every kernel from ncu's text.

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
    """Run our kernels once between the marks that ncu waits for; ncu starts this program."""
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
