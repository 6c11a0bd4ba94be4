"""Build for the GPU of this machine, test on it, measure everything, and write one file of results; offline.

Run from the repository root:

python -m benchmarks.gpu                        # all parts, within 10 minutes
python -m benchmarks.gpu --only ops engine      # some of them
python -m benchmarks.gpu --build-only           # needs nvcc, but no GPU
python -m benchmarks.gpu --merge FILE ...       # take parts from other runs' files into benchmarks/results

Needs torch, triton, nvcc, cmake, ninja and pybind11; installs nothing. The result is
benchmarks/results/gpu-DEVICE.json. Each result is on disk as soon as it exists, whatever happens later. A part that is
finished at this very commit does not run again. Exit status: 0; 1 if something failed; 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.build import build_package, gpu_architecture
from benchmarks.gpu.jobs import Runner, read_content
from benchmarks.gpu.results import PARTS, GpuResults
from benchmarks.gpu.tables import gpu_facts, gpu_tables, is_passed
from benchmarks.gpu.worker import jobs_of
from tikmix_fast import files

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SHARES = {"tests": 4.0, "ops": 4.0, "engine": 1.5, "profile": 1.0}
"""A part gets this share of the time that is left when it starts."""

# A kernel that waits for ever would take all the time. The first call of a Triton kernel tries its configurations.
PATIENCE = 150.0

Tell = Callable[[str], object]


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", action="extend", choices=PARTS, help="parts to run (all)")
    parser.add_argument("--limit", type=float, default=570, help="seconds for everything, the build included (570)")
    parser.add_argument("--budget", nargs="*", default=[], metavar="PART=SECONDS", help="at most this for a part")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--folder", type=Path, help="folder of the build (build/gpu-ARCHITECTURE)")
    parser.add_argument("--commit", help="commit of the sources, if there is no git to ask")
    parser.add_argument("--again", action="store_true", help="also run parts that are finished at this commit")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--architecture", help="to build for, such as 90a (that of the GPU)")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, with the installed package")
    arguments = parser.parse_args(argv)
    arguments.only = [part for part in PARTS if part in (arguments.only or PARTS)]
    budgets = {}
    for each in arguments.budget:
        part, _, seconds = each.partition("=")
        if part not in PARTS or not seconds.replace(".", "", 1).isdigit():
            parser.error(f"--budget must be like ops=200, with a part of {', '.join(PARTS)}; got {each!r}")
        budgets[part] = float(seconds)
    arguments.budget = budgets
    if arguments.build_only and not arguments.architecture:
        arguments.architecture = "90a"
    arguments.out = arguments.out.resolve()  # workers run in another folder
    arguments.folder = arguments.folder.resolve() if arguments.folder else None
    if arguments.rehearse and arguments.out == RESULTS:
        parser.error("--rehearse needs --out: its numbers mean nothing and must not lie among the results")
    return arguments


def seconds_for(part: str, todo: list[str], left: float, budgets: dict[str, float]) -> float:
    """Return the time of the next part: its share of the rest, but no more than its budget."""
    share = left * SHARES[part] / sum(SHARES[each] for each in todo)
    return max(0.0, min(share, budgets.get(part, share)))


def run_part(runner: Runner, part: str, seconds: float, results: GpuResults) -> bool:
    """Run all jobs of a part at the same time, and return whether all got to their end."""
    jobs = jobs_of(part, runner.root, runner.rehearse)
    with ThreadPoolExecutor(len(jobs)) as pool:
        running = [
            pool.submit(
                runner.run, job, seconds, partial(results.put, part, job), environment,
                PATIENCE if job in ("ops", "engine") or " " in job else None,  # the others are silent for minutes
            )
            for job, environment in jobs.items()
        ]  # fmt: skip
        return min([each.result() for each in running])  # the list waits for all jobs


def find_architecture(arguments: argparse.Namespace) -> str | None:
    """Return the architecture to build for, or None if there is no GPU."""
    if arguments.architecture:
        return str(arguments.architecture)
    import torch

    return gpu_architecture(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def main(argv: list[str] | None = None) -> int:
    """Run the parts that the command line names, and print the tables last."""
    arguments = arguments_of(argv)
    began = time.monotonic()
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])

    def tell(line: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {line}", flush=True)

    if arguments.merge:
        for path in arguments.merge:
            results = GpuResults(arguments.out, read_content(path).get("device", {}).get("name", "unknown"))
            results.merge([path])
            tell(f"{path} is merged into {results.path}")
        return 0
    site = None
    build: dict[str, Any] = {}
    folder = arguments.folder or arguments.out / "rehearsal"
    if not arguments.rehearse:
        architecture = find_architecture(arguments)
        if architecture is None:
            print(
                "no CUDA device is visible to torch: run this on a machine with a GPU, with --build-only to compile, "
                "or with --rehearse --out FOLDER to see that everything else runs",
                file=sys.stderr,
            )
            return 2
        folder = arguments.folder or ROOT / "build" / f"gpu-{architecture}"
        tell(f"building for {architecture} in {folder}")
        built = build_package(ROOT, folder, architecture, arguments.limit)
        site, build = built.site, {**built.to_dict(), "architecture": architecture}
        for kernel in built.kernels:
            print("{architecture:>9} {registers:4} registers {spilled_bytes:5} B spilled  {name}".format(**kernel))
        tell("built" if built.cuda is None else f"built WITHOUT the CUDA module: {built.cuda}")
        if arguments.build_only:
            return 0 if built.cuda is None else 1
    return measure(arguments, Runner(ROOT, folder / "work", site, arguments.rehearse), build, began, tell)


def measure(arguments: argparse.Namespace, runner: Runner, build: dict[str, Any], began: float, tell: Tell) -> int:
    """Run the parts that have no result at this commit, and return the exit status."""
    facts: dict[str, Any] = {}
    if not runner.run("describe", 120, facts.update) or "device" not in facts:
        print(f"the device cannot be described: {facts.get('failure')}; see {runner.folder}", file=sys.stderr)
        return 1
    if arguments.commit is None:
        from tikmix_fast.report.environment import describe_environment

        arguments.commit = describe_environment()["commit"]
    facts["environment"]["commit"] = arguments.commit
    results = GpuResults(arguments.out, facts["device"]["name"])
    results.describe(**facts, build=build)
    todo = [part for part in arguments.only if arguments.again or not results.has(part, arguments.commit)]
    for part in set(arguments.only) - set(todo):
        tell(f"{part}: {results.path} has it at this commit")
    while todo:
        part, left = todo[0], arguments.limit - (time.monotonic() - began)
        seconds = seconds_for(part, todo, left, arguments.budget)
        todo.pop(0)
        if seconds < (1 if arguments.rehearse else 15):
            tell(f"{part}: left out, {left:.0f} s are left")
            continue
        tell(f"{part}: up to {seconds:.0f} s")
        start = time.monotonic()
        results.begin(part, arguments.commit, datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"))
        finished = run_part(runner, part, seconds, results)
        results.finish(part, time.monotonic() - start, finished)
        for text in runner.folder.glob(f"{part}-*.txt"):
            copy = results.path.with_name(f"{results.path.stem}-{text.name}")
            files.write_text(copy, text.read_text(errors="replace"))
        tell(f"{part}: {'done' if finished else 'not finished'}")
        for job, content in results.content["parts"][part]["jobs"].items():
            for key in ("failure", "stopped", "crashed", "wrong"):
                if content.get(key):
                    tell(f"  {job}: {key}: {content[key]}")
    tables = gpu_tables(results.content)
    for table in [*tables[1:], *tables[:1]]:  # the goals last: readers see the end of the output first
        print(f"\n**{table.title}**\n\n{table.to_markdown()}")
    print(f"\n{gpu_facts(results.content)}.\n{results.path}")
    return 0 if is_passed(results.content, arguments.only) else 1


if __name__ == "__main__":
    sys.exit(main())
