"""Tiny runs of every suite: plain JSON, everything right, everything with a reason."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_mixture, bench_ops, bench_sampler
from benchmarks import run as run_script
from benchmarks.suites import ALL_SUITES
from benchmarks.suites.mixture import measure_mixture
from benchmarks.suites.neighbours import find_neighbours
from benchmarks.suites.sampler import measure_sampler
from tikmix_fast.benchmarking import measurement
from tikmix_fast.benchmarking.autograd_truth import Truth
from tikmix_fast.benchmarking.measurement import FLOOR, TINY_MEASUREMENT, MeasurementMethod
from tikmix_fast.benchmarking.suites import BenchSettings, run_suite

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": "huge"}, "size must be"), ({"rounds": 0}, "rounds must be"), ({"seconds": 0.0}, "seconds must be")],
)
def test_settings_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchSettings(**options)


def test_an_unknown_suite_is_refused() -> None:
    with pytest.raises(ValueError, match="suite must be one of ops, engine; got 'gpu'"):
        run_suite("gpu", BenchSettings.of("tiny"))


def test_engine_suite() -> None:
    said: list[str] = []
    result = json.loads(json.dumps(run_suite("engine", BenchSettings.of("tiny"), said.append, ALL_SUITES)))
    assert [len(case["rows"]) for case in result["steps"]] == [4, 4]
    assert all(0 < case["error"] <= 2 * case["eager_error"] + 1e-7 for case in result["steps"])
    fast, slow = result["measurements"]
    assert [row["method"] for row in fast["rows"] if row["ours"]] == ["tikmix_fast", "tikmix_fast, check_every=0"]
    assert fast["rows"][0]["method"] == slow["rows"][0]["method"] == FLOOR
    assert "a backward per domain, mixed" in [row["method"] for row in slow["rows"]]
    assert all(row["error"] < 1e-6 for case in (fast, slow) for row in case["rows"][1:])
    # Those that can run and those that cannot are all there.
    assert {*slow["skipped"], *(row["method"].split(",")[0] for row in slow["rows"])} > {"opacus", "captum", "bergson"}
    assert any("training step" in each for each in said)
    assert result["environment"]["backends"]["reference"] is None


def test_the_truth_is_a_loop_over_sequences() -> None:
    data = measurement.make_measurement(TINY_MEASUREMENT)
    model = data.model.double()
    parameters = list(model.parameters())

    def gradient(sequences: torch.Tensor) -> torch.Tensor:
        total = 0
        for sequence in sequences:
            logits = model(sequence[None, :-1])[0]
            loss = -torch.log_softmax(logits, -1)[torch.arange(len(sequence) - 1), sequence[1:]].mean()
            total = total + torch.cat([each.flatten() for each in torch.autograd.grad(loss, parameters)])
        return total / len(sequences)

    truth = Truth.of(data.model, data.tasks, data.domains)
    torch.testing.assert_close(truth.tasks[1], gradient(torch.cat(data.tasks[1])))
    torch.testing.assert_close(truth.domains[2], gradient(torch.cat(data.domains[2])))
    mixed, ids = (torch.cat(each) for each in zip(*data.mixed, strict=True))
    torch.testing.assert_close(truth.domains[2], gradient(mixed[ids == 2]))


def test_a_wrong_measurement_is_caught() -> None:
    methods = measurement.measurement_methods()
    right = methods["plain torch, sorted batches"].prepare
    broken = MeasurementMethod(lambda data: lambda: right(data)().flip(1))
    with pytest.raises(AssertionError, match="broken is wrong"):
        measurement.measure_measurement(TINY_MEASUREMENT, {FLOOR: methods[FLOOR], "broken": broken}, rounds=1)


def test_neighbours_are_run_or_skipped_with_a_reason() -> None:
    methods, missing = find_neighbours()
    packages = {name.split(",")[0] for name in methods}
    assert packages | set(missing) == {"opacus", "captum", "bergson", "kronfluence"}
    assert all(missing.values())


def test_mixture_measurement() -> None:
    result = measure_mixture(8, 3, rounds=2)
    assert [row["method"] for row in result["rows"]] == ["auto", "slsqp", "interior"]
    assert min(row["objective_above_best"] for row in result["rows"]) == 0
    assert list(measure_mixture(150, 3, rounds=1)["skipped"]) == ["slsqp"]


def test_sampler_memory_does_not_grow_with_the_samples() -> None:
    result = measure_sampler(8, 10**8, 5000, rounds=2)
    assert [row["draws_per_second"] > 0 for row in result["rows"]] == [True, True]
    few, many = (row["peak_bytes"] for row in reversed(result["memory"][:2]))
    assert many < 1.05 * few


class FakeBenchmark:
    """Stands for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    def pedantic(self, function: Callable[..., Any], args: tuple = (), kwargs: Any = None, rounds: int = 1) -> Any:
        return function(*args, **(kwargs or {}))


def test_benchmark_files_run_their_methods() -> None:
    tiny = BenchSettings("tiny", rounds=1)
    case = bench_ops.CASES[0]
    names = [name for each, name in bench_ops.PAIRS if each == case]
    assert {"plain weight gradient", "tikmix_fast"} <= set(names)
    benchmark = FakeBenchmark()
    bench_ops.test_method(benchmark, tiny, case, "tikmix_fast")
    assert benchmark.extra_info["error"] < 1e-6
    bench_sampler.test_draws(benchmark, tiny)
    assert benchmark.extra_info["rows"][0]["draws_per_second"] > 0
    bench_mixture.test_tikmix_d(FakeBenchmark(), tiny, 0, "interior")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "chosen", "tests"),
    [
        (["bench_ops.py"], "plain or packed", 5 + 4),
        (["bench_mixture.py", "bench_sampler.py"], "interior or draws", 3),
        (["bench_engine.py"], "not memory", 3),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_pytest_benchmark_runs_the_files(files: list[str], chosen: str, tests: int, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *(str(BENCHMARKS / each) for each in files), "--tiny", "-q", "-p",
         "no:cacheprovider", "-k", chosen, f"--benchmark-json={out}", "--benchmark-max-time=0.001",
         "--benchmark-min-rounds=1", "--benchmark-warmup=off"],
        cwd=BENCHMARKS.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    content = json.loads(out.read_text())["benchmarks"]
    assert len(content) >= tests
    assert all("error" in each["extra_info"] for each in content if "bench_ops" in each["fullname"])


def test_a_run_makes_every_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    ran: list[str] = []

    def run_suite(name, settings, tell, suites):
        ran.append(name)
        if name == "engine" and len(ran) < 6:
            raise AssertionError("wrong")
        return {"suite": name, "settings": vars(settings), "environment": run_script.describe_environment()}

    clean = {"commit": "0123", "machine": {}, "packages": {}, "variables": {}}
    monkeypatch.setattr(run_script, "run_suite", run_suite)
    monkeypatch.setattr(run_script, "describe_environment", lambda: clean)
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path), "--size", "tiny"])
    with pytest.raises(SystemExit, match="failed: engine"):
        run_script.main()
    assert ran == ["ops", "choice", "engine", "mixture", "sampler"]
    run_script.main()  # only what is not there yet
    assert ran[5:] == ["engine"]
    clean["commit"] = "4567"
    run_script.main()
    assert ran[6:] == ["ops", "choice", "engine", "mixture", "sampler"]
    clean["commit"] = "4567 with changes"
    run_script.main()
    assert len(ran) == 16
