"""``python -m benchmarks.gpu`` without a GPU: arguments, workers that die, results saved and resumed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.jobs import MOST_STARTS, Runner, run_job
from benchmarks.gpu.results import GpuResults
from benchmarks.gpu.suite import run_suite_of_tests
from benchmarks.gpu.worker import jobs_of

ROOT = Path(__file__).parents[2]


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = gpu.arguments_of(["--only", "engine", "--only", "tests", "--budget", "ops=20", "engine=7.5"])
    assert arguments.only == ["tests", "engine"]  # in the order in which they run
    assert arguments.budget == {"ops": 20.0, "engine": 7.5}
    assert gpu.arguments_of([]).only == ["tests", "ops", "engine", "profile"]
    assert gpu.arguments_of([]).limit < 600
    assert gpu.arguments_of(["--build-only"]).architecture == "90a"
    for wrong in (["--only", "speed"], ["--budget", "speed=1"], ["--budget", "ops"], ["--rehearse"]):
        with pytest.raises(SystemExit):
            gpu.arguments_of(wrong)
    assert "--rehearse needs --out" in capsys.readouterr().err


def test_time_that_a_part_does_not_use_is_left_to_the_next() -> None:
    parts = ["tests", "ops", "engine", "profile"]
    total = sum(gpu.SHARES.values())
    assert gpu.seconds_for("tests", parts, 420.0, {}) == pytest.approx(420 * gpu.SHARES["tests"] / total)
    assert gpu.seconds_for("profile", ["profile"], 33.0, {}) == 33
    assert gpu.seconds_for("tests", parts, 420.0, {"tests": 5.0}) == 5
    assert gpu.seconds_for("tests", parts, -3.0, {}) == 0


def test_without_a_gpu_it_says_so(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no CUDA device is visible to torch: run this on a machine with a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(("capability", "built"), [((9, 0), "90a"), ((8, 6), "86"), ((12, 0), "120")])
def test_it_builds_for_the_card(monkeypatch, capability: tuple[int, int], built: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert gpu.find_architecture(gpu.arguments_of([])) == built
    assert gpu.find_architecture(gpu.arguments_of(["--architecture", "80"])) == "80"


def worker(tmp_path: Path, source: str) -> tuple[Callable[[], subprocess.Popen], Path]:
    """A worker that runs ``source`` with ``content``, ``starts`` (how often it was started) and ``save``."""
    path, count = tmp_path / "content.json", tmp_path / "starts"
    script = f"""
import json, os, sys, time
from pathlib import Path
path, count = Path({str(path)!r}), Path({str(count)!r})
content = json.loads(path.read_text()) if path.exists() else {{}}
starts = len(count.read_text()) + 1 if count.exists() else 1
count.write_text("x" * starts)
def save():
    Path(str(path) + ".new").write_text(json.dumps(content)); os.replace(str(path) + ".new", path)
{source}
"""
    return lambda: subprocess.Popen([sys.executable, "-S", "-c", script], start_new_session=True), path


def run(tmp_path: Path, source: str, seconds: float = 30, patience: float | None = None):
    start, path = worker(tmp_path, source)
    published: list[dict[str, Any]] = []
    done = run_job(start, path, time.monotonic() + seconds, patience, published.append)
    return done, published[-1] if published else {}, len((tmp_path / "starts").read_text())


def test_a_job_that_ends_well(tmp_path: Path) -> None:
    assert run(tmp_path, "content['a'] = 1; save()") == (True, {"a": 1}, 1)


def test_a_job_goes_on_after_a_crash_and_is_told_of_it(tmp_path: Path) -> None:
    source = """
died = content.pop("trying", None)
if died: content["crashed"] = died
if starts == 1:
    content["trying"] = {"what": "a kernel"}; save(); os.abort()
save()
"""
    done, content, starts = run(tmp_path, source)
    assert (done, starts) == (True, 2)
    assert content == {"crashed": {"what": "a kernel", "why": "ended with status -6"}}


def test_a_kernel_that_waits_for_ever_is_ended(tmp_path: Path) -> None:
    source = """
content["before"] = content.pop("trying", None)
content["trying"] = {"what": "a kernel"}; save()
if starts == 1: time.sleep(100)
del content["trying"]; save()
"""
    done, content, starts = run(tmp_path, source, patience=3.0)
    assert (done, starts) == (True, 2)
    assert content["before"] == {"what": "a kernel", "why": "no news for 3 s"}


def test_another_process_on_demand_but_not_for_ever(tmp_path: Path) -> None:
    done, content, starts = run(tmp_path, "content['starts'] = starts; save(); sys.exit(3)")
    assert (done, content, starts) == (False, {"starts": MOST_STARTS}, MOST_STARTS)


def test_what_is_there_is_kept_when_the_time_is_up(tmp_path: Path) -> None:
    done, content, starts = run(tmp_path, "content['a'] = 1; save(); time.sleep(100)", seconds=3.0)
    assert (done, starts) == (False, 1)
    assert content == {"a": 1, "stopped": "the time was up"}


def test_a_job_that_fails_for_no_kernel_is_not_tried_again(tmp_path: Path) -> None:
    done, content, starts = run(tmp_path, "content['a'] = 1; save(); raise KeyError")
    assert (done, content, starts) == (False, {"a": 1, "failure": "ended with status 1"}, 1)


TESTS = """
import os, pytest, torch
def test_one(): pass
def test_two(): assert 1 == 2, "not equal"
def test_three(): pytest.skip("a reason")
def test_four(): os._exit(9)
def test_five(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
@pytest.mark.slow
def test_six(): pass
"""


@pytest.mark.slow
def test_tests_after_a_crash_and_after_a_lost_device_are_run_all_the_same(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "tests").mkdir(parents=True)
    (tree / "tests" / "test_some.py").write_text(TESTS)
    option = "def pytest_addoption(parser): parser.addoption('--full', action='store_true')\n"
    (tree / "tests" / "conftest.py").write_text(option)
    runner = Runner(ROOT, tmp_path / "work", None, rehearse=True)
    runner.environment["OMP_NUM_THREADS"] = "1"
    runner.root = tree
    published: list[dict[str, Any]] = []
    assert runner.run("some tests/test_some.py", 120, published.append)
    content = published[-1]
    name = "tests/test_some.py::test_"
    assert content["passed"] == [f"{name}one", f"{name}six"]
    assert content["skipped"] == {f"{name}three": "Skipped: a reason"}
    assert set(content["failed"]) == {f"{name}two", f"{name}four", f"{name}five"}
    assert "not equal" in content["failed"][f"{name}two"]
    assert content["failed"][f"{name}four"].startswith("the process died: ended with status 9")
    assert content["collected"] == 6


def test_outcomes_are_recorded_and_a_lost_device_asks_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = TESTS.replace("os._exit(9)", "raise AssertionError('not run again')")
    (tmp_path / "test_some.py").write_text(source)
    option = "def pytest_addoption(parser): parser.addoption('--full', action='store_true')\n"
    (tmp_path / "conftest.py").write_text(option)
    monkeypatch.chdir(tmp_path)
    content = {"trying": {"what": "test_some.py::test_four", "why": "ended with status 9"}}
    name = "test_some.py::test_"
    lost = run_suite_of_tests(
        content, 60, lambda content: None, root=tmp_path, paths=["test_some.py", "missing.py"], environment={}
    )
    assert lost
    assert content["lost"] == f"{name}five"
    assert content["passed"] == [f"{name}one"]
    assert content["skipped"] == {f"{name}three": "Skipped: a reason"}
    assert content["failed"][f"{name}four"] == "the process died: ended with status 9"
    assert content["failed"]["missing.py"] == "there is no such file"
    assert set(content["failed"]) == {f"{name}two", f"{name}four", f"{name}five", "missing.py"}


FACTS = {"device": {"name": "Fake GPU 7"}, "environment": {"packages": {}, "nvcc": None}}
CONTENT = {
    "ops": {"cases": [], "ceilings": {"bandwidth": 1e12, "flops": {}, "l2": None, "l2_why_not": "x"}},
    "engine": {"steps": []},
    "profile": {},
}


class FakeRunner:
    """Answers every job with made-up content."""

    root, rehearse = ROOT, True

    def __init__(self, folder: Path, fails: tuple[str, ...] = ()) -> None:
        self.folder, self.fails = folder, fails
        folder.mkdir(exist_ok=True)
        self.ran: list[str] = []

    def run(self, job: str, seconds: float, publish: Callable, environment=None, patience=None) -> bool:
        if job == "describe":
            publish(json.loads(json.dumps(FACTS)))
            return True
        self.ran.append(job)
        publish({"half": True})
        if job in self.fails:
            return False
        publish(CONTENT.get(job, {"passed": ["a", "b"], "skipped": {"c": "why"}, "failed": {}}))
        (self.folder / "profile-ncu.txt").write_text("numbers")
        return True


def measure(folder: Path, *argv: str, fails: tuple[str, ...] = ()) -> tuple[int, list[str]]:
    arguments = gpu.arguments_of(["--out", str(folder / "out"), "--rehearse", *argv])
    runner = FakeRunner(folder / "work", fails)
    status = gpu.measure(arguments, runner, {}, time.monotonic(), lambda what: None)
    return status, [job.split(" ")[0] for job in runner.ran]


def test_parts_are_kept_resumed_and_done_again(tmp_path: Path) -> None:
    status, ran = measure(tmp_path, "--commit", "abc", fails=("ops",))
    assert status == 1
    assert [*dict.fromkeys(ran)] == ["cpu", "ops", "engine", "profile"]
    path = tmp_path / "out" / "gpu-fake-gpu-7.json"
    parts = json.loads(path.read_text())["parts"]
    assert [part["finished"] for part in parts.values()] == [True, False, True, True]
    assert parts["ops"]["jobs"]["ops"] == {"half": True}
    job = next(iter(parts["tests"]["jobs"].values()))
    assert (job["passed"], job["skipped"]) == (2, {"why": 1})
    assert (tmp_path / "out" / "gpu-fake-gpu-7-profile-ncu.txt").read_text() == "numbers"

    assert measure(tmp_path, "--commit", "abc") == (0, ["ops"])  # only what was not finished
    assert measure(tmp_path, "--commit", "abc") == (0, [])
    assert measure(tmp_path, "--commit", "abc", "--only", "engine", "--again")[1] == ["engine"]
    assert measure(tmp_path, "--commit", "def", "--only", "engine")[1] == ["engine"]
    parts = json.loads(path.read_text())["parts"]
    assert {name: part["commit"] for name, part in parts.items()} == {
        "tests": "abc", "ops": "abc", "engine": "def", "profile": "abc",
    }  # fmt: skip
    assert measure(tmp_path, "--commit", "def with changes", "--only", "engine")[1] == ["engine"]
    assert measure(tmp_path, "--commit", "def with changes", "--only", "engine")[1] == ["engine"]


def test_no_part_begins_without_time(tmp_path: Path) -> None:
    assert measure(tmp_path, "--commit", "abc", "--limit", "0") == (1, [])


def results_of(folder: Path, device: str, **parts: tuple[str, bool]) -> Path:
    results = GpuResults(folder, device)
    results.describe(device={"name": device}, environment={"packages": {"torch": folder.name}})
    for part, (date, finished) in parts.items():
        results.begin(part, f"commit of {folder.name}", date)
        results.put(part, part, {"from": folder.name})
        results.finish(part, 1.0, finished)
    return results.path


def test_merging_takes_what_is_newer_and_finished(tmp_path: Path) -> None:
    old = results_of(tmp_path / "old", "D 1", ops=("2026-01-01", True), engine=("2026-01-05", True))
    new = results_of(
        tmp_path / "new", "D 1", ops=("2026-01-02", True), engine=("2026-01-06", False), profile=("2026-01-02", True)
    )
    assert gpu.main(["--merge", str(old), str(new), "--out", str(tmp_path / "both")]) == 0
    merged = json.loads((tmp_path / "both" / "gpu-d-1.json").read_text())
    assert {name: part["jobs"][name]["from"] for name, part in merged["parts"].items()} == {
        "ops": "new", "engine": "old", "profile": "new",
    }  # fmt: skip
    assert merged["environment"]["packages"]["torch"] == "new"


def test_results_of_something_else_are_not_merged(tmp_path: Path) -> None:
    mine = GpuResults(tmp_path / "mine", "D 1")
    mine.describe(device={"name": "D 1"})
    with pytest.raises(ValueError, match="must hold results of D 1; got D 2"):
        mine.merge([results_of(tmp_path, "D 2")])
    (tmp_path / "other.json").write_text('{"suite": "ops"}')
    with pytest.raises(ValueError, match=r"must hold results of python -m benchmarks\.gpu; got suite 'ops'"):
        mine.merge([tmp_path / "other.json"])


def test_jobs() -> None:
    assert jobs_of("ops", ROOT) == {"ops": {}}
    jobs = jobs_of("tests", ROOT)
    assert jobs["cuda tests/gpu/test_on_gpu_values.py"]["TIKMIX_FAST_REQUIRE"] == "cuda"
    assert {"memcheck", "racecheck"} < set(jobs)
    assert any(job.startswith("engine ") for job in jobs)
    assert all((ROOT / job.split(" ")[1]).exists() for job in jobs if " tests/gpu" in job)


@pytest.mark.slow
def test_a_rehearsal_on_the_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", tmp_path, "--limit", "500"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "gpu-rehearsal.json").read_text())
    assert all(part["finished"] for part in content["parts"].values())
    assert sum(job["passed"] for job in content["parts"]["tests"]["jobs"].values()) > 200
    assert len(content["parts"]["ops"]["jobs"]["ops"]["cases"]) == 3
    assert "**Goals**" in done.stdout
