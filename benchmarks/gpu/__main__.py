"""Build for the GPU of this machine, test on it, measure everything, and write it all into one file; offline.

python benchmarks/gpu.py                        # all parts, within 10 minutes
python benchmarks/gpu.py --only ops engine      # some of them
python benchmarks/gpu.py --build-only           # needs nvcc, but no GPU
python benchmarks/gpu.py --merge FILE ...       # take parts from other runs' files into benchmarks/results

Needs torch, triton, nvcc, cmake, ninja and pybind11; nothing is installed. The result is
benchmarks/results/gpu-DEVICE.json; what is there of every part is on disk from then on, whatever happens later. A part
that was finished at this very commit is not run again. Exit status: 0; 1 if something failed; 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # unless it is installed

from benchmarks.gpu.build import build_package, gpu_architecture, interpreter_for  # noqa: E402
from benchmarks.gpu.results import PARTS, GpuResults  # noqa: E402
from benchmarks.gpu.tables import gpu_facts, gpu_tables, is_passed  # noqa: E402
from benchmarks.gpu.worker import AGAIN, jobs_of  # noqa: E402
from tikmix_fast import files  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SHARES = {"tests": 4.0, "ops": 4.0, "engine": 1.5, "profile": 1.0}
"""Of the time that is left when a part begins."""

MOST_STARTS = 6
# A kernel that waits for ever would take all the time; the first call of a Triton kernel tries its configurations.
PATIENCE = 150.0

Tell = Callable[[str], object]


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", action="extend", choices=PARTS, help="parts to run (all)")
    parser.add_argument("--limit", type=float, default=570, help="seconds for everything, the build included (570)")
    parser.add_argument("--budget", nargs="*", default=[], metavar="PART=SECONDS", help="at most this for a part")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--folder", type=Path, help="where it is built (build/gpu-ARCHITECTURE)")
    parser.add_argument("--commit", help="of the sources, where there is no git to ask")
    parser.add_argument("--again", action="store_true", help="run also what was finished at this commit")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--architecture", help="to build for (that of the GPU), such as 90a")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, with the package as installed")
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
    arguments.out = arguments.out.resolve()  # workers run elsewhere
    arguments.folder = arguments.folder.resolve() if arguments.folder else None
    if arguments.rehearse and arguments.out == RESULTS:
        parser.error("--rehearse needs --out: its numbers mean nothing and must not lie among the results")
    return arguments


def seconds_for(part: str, todo: list[str], left: float, budgets: dict[str, float]) -> float:
    """Return the time of the next part: its share of what is left, but no more than its budget."""
    share = left * SHARES[part] / sum(SHARES[each] for each in todo)
    return max(0.0, min(share, budgets.get(part, share)))


def run_job(
    start: Callable[[], subprocess.Popen[bytes]],
    content_path: Path,
    end: float,
    patience: float | None,
    publish: Callable[[dict[str, Any]], object],
    last_words: Callable[[], str] = lambda: "",
) -> bool:
    """Run one job until it is done, in as many processes as it takes; return whether it was done.

    Parameters
    ----------
    start : callable () -> Popen
        Starts a worker in a session of its own.
    content_path : Path
        Where the worker keeps what it has, and is to find it again.
    end : float
        On the monotonic clock.
    patience : float or None
        Seconds without news after which a process is taken for stuck.
    publish : callable (dict) -> object
        Called with what the worker has, whenever that is news.
    last_words : callable () -> str
        Returns the end of what the worker printed.
    """
    for _ in range(MOST_STARTS):
        process = start()
        news, stuck, late = time.monotonic(), False, False
        seen = None
        while process.poll() is None:
            time.sleep(0.2)
            now = time.monotonic()
            changed = content_path.stat().st_mtime_ns if content_path.exists() else None
            if changed != seen:
                seen, news = changed, now
                publish(_read(content_path))
            late, stuck = now > end, patience is not None and now - news > patience
            if late or stuck:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        content = _read(content_path)
        if process.returncode == 0:
            publish(content)
            return True
        if late:
            content["stopped"] = "the time was up"
        elif process.returncode != AGAIN:
            why = (
                f"no news for {patience:.0f} s"
                if stuck
                else f"ended with status {process.returncode} {last_words()}".strip()
            )
            if "trying" in content:
                content["trying"].setdefault("why", why)
            else:
                content.setdefault("failure", why)
        files.write_json(content_path, content)
        publish(content)
        if late or "failure" in content:
            return False
    return False


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


class Runner:
    """Starts workers on the staged package.

    Parameters
    ----------
    arguments : Namespace
    folder : Path
        Where workers run and keep what they have.
    site : Path or None
        Of the staged package; None to use the installed one.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path, site: Path | None) -> None:
        self.arguments, self.folder = arguments, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.interpreter, self.environment = ([sys.executable], {}) if site is None else interpreter_for(site)
        self.environment |= {
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def run(
        self, job: str, seconds: float, publish: Callable[[dict[str, Any]], object],
        environment: dict[str, str] | None = None, patience: float | None = None,
    ) -> bool:  # fmt: skip
        """Run one job from its beginning; see `run_job`."""
        name = "".join(each if each.isalnum() else "-" for each in job)
        content_path = self.folder / f"{name}.json"
        content_path.unlink(missing_ok=True)
        log_path = self.folder / f"{name}.log"
        log_path.unlink(missing_ok=True)
        end = time.monotonic() + seconds

        def start() -> subprocess.Popen[bytes]:
            left = max(end - time.monotonic(), 1.0)
            command = [
                *self.interpreter, "-m", "benchmarks.gpu.worker", job, "--content", str(content_path),
                "--root", str(ROOT), "--seconds", str(0.9 * left),
            ]  # fmt: skip
            with log_path.open("ab") as log:
                return subprocess.Popen(
                    [*command, *(["--rehearse"] if self.arguments.rehearse else [])],
                    cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    env=os.environ | self.environment | (environment or {}),
                )  # fmt: skip

        return run_job(
            start, content_path, end, patience, publish, lambda: log_path.read_text(errors="replace")[-500:]
        )  # fmt: skip


def run_part(runner: Runner, part: str, seconds: float, results: GpuResults) -> bool:
    """Run all jobs of a part at the same time, and return whether all were done."""
    jobs = jobs_of(part, ROOT, runner.arguments.rehearse)
    with ThreadPoolExecutor(len(jobs)) as pool:
        running = [
            pool.submit(
                runner.run, job, seconds, lambda content, job=job: results.put(part, job, content), environment,
                PATIENCE if job in ("ops", "engine") or " " in job else None,  # the others are silent for long
            )
            for job, environment in jobs.items()
        ]  # fmt: skip
        return min([each.result() for each in running])  # waits for all, whatever the first one says


def find_architecture(arguments: argparse.Namespace) -> str | None:
    """Return what to build for, or None where there is no GPU."""
    if arguments.architecture:
        return str(arguments.architecture)
    import torch

    return gpu_architecture(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def main(argv: list[str] | None = None) -> int:
    """Run what was asked for, and print the tables last."""
    arguments = arguments_of(argv)
    began = time.monotonic()
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])

    def tell(what: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {what}", flush=True)

    if arguments.merge:
        for path in arguments.merge:
            results = GpuResults(arguments.out, _read(path).get("device", {}).get("name", "unknown"))
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
    return measure(arguments, Runner(arguments, folder / "work", site), build, began, tell)


def measure(arguments: argparse.Namespace, runner: Runner, build: dict[str, Any], began: float, tell: Tell) -> int:
    """Run the parts that are not there yet, and return the exit status."""
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
        tell(f"{part}: {results.path} has it at this commit already")
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
            files.write_text(
                results.path.with_name(f"{results.path.stem}-{text.name}"), text.read_text(errors="replace")
            )
        tell(f"{part}: {'done' if finished else 'not finished'}")
        for job, content in results.content["parts"][part]["jobs"].items():
            for key in ("failure", "stopped", "crashed", "wrong"):
                if content.get(key):
                    tell(f"  {job}: {key}: {content[key]}")
    tables = gpu_tables(results.content)
    for table in [*tables[1:], *tables[:1]]:  # the goals last: the end of the output is what is seen first
        print(f"\n**{table.title}**\n\n{table.to_markdown()}")
    print(f"\n{gpu_facts(results.content)}.\n{results.path}")
    return 0 if is_passed(results.content, arguments.only) else 1


if __name__ == "__main__":
    sys.exit(main())
