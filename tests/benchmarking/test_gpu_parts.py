"""The parts of ``python -m benchmarks.gpu`` on a CPU: answers right and wrong, crashes, clocks, tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import ops as gpu_ops
from benchmarks.gpu import profiles as gpu_profiles
from benchmarks.gpu.cases import GPU_CASES, TINY_GPU_CASES, Bar
from benchmarks.gpu.device import Rehearsal, find_device, read_smi
from benchmarks.gpu.methods import gpu_methods
from benchmarks.gpu.ops import measure_gpu_case, run_ops
from benchmarks.gpu.profiles import run_profile
from benchmarks.gpu.sanitizer import run_sanitizer
from benchmarks.gpu.timing import time_in_turn
from tikmix_fast.benchmarking import layer_truth
from tikmix_fast.benchmarking.baselines import PLAIN, Answer, Method
from tikmix_fast.benchmarking.layer_truth import LayerTruth
from tikmix_fast.benchmarking.ops import Case, make_layer
from tikmix_fast.testing import domain_gradients

CEILINGS = {"bandwidth": 1e9, "flops": {"bfloat16": 1e10, "float32": 1e10, "float16": 1e10}}
EXACT = Bar(Case(64, 24, 16, 3, 2, "bfloat16"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what Triton's interpreter takes long for, where it is not what is tested."""

    def without(projection: int | None = None) -> dict[str, Method]:
        return {name: method for name, method in gpu_methods(projection).items() if "triton" not in name}

    monkeypatch.setattr(gpu_ops, "gpu_methods", without)
    monkeypatch.setattr(gpu_profiles, "gpu_methods", without)


def never(content: dict[str, Any]) -> None:
    json.dumps(content, allow_nan=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(70, 40, 24, 3, 2), (8, 8, 8, 6, 4)])
def test_every_method_is_right(dtype: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes with several slices of weights, and with empty domains; what is not available says why."""
    monkeypatch.setattr(layer_truth, "_SLICE", 16)
    monkeypatch.setattr(gpu_ops, "_SHORT", 0.0)
    result = measure_gpu_case(Rehearsal(), Bar(Case(*shape, dtype)), CEILINGS, rounds=1)
    assert result["wrong"] == {}
    methods = {row["method"]: row for row in result["rows"]}
    assert {PLAIN, "torch, domain by domain", "torch, stacked + GEMM", "panels of 128, two passes", "row-wise (ghost)",
            "tikmix_fast", "tikmix_fast, influence only"} <= set(methods)  # fmt: skip
    assert set(methods) | set(result["skipped"]) == set(gpu_methods())
    assert all(result["skipped"].values())
    assert ("tikmix_fast, vendor two-pass" in methods) == (dtype == "bfloat16")
    assert methods[PLAIN]["error"] is None
    assert all(row["error"] is not None for name, row in methods.items() if name != PLAIN)


@pytest.mark.usefixtures("quick")
def test_every_projected_method_is_right() -> None:
    result = measure_gpu_case(Rehearsal(), Bar(Case(300, 200, 136, 5, 3, "bfloat16", 32)), CEILINGS, rounds=1)
    assert result["wrong"] == result["skipped"] == {}
    assert [row["sampling_error"] is None for row in result["rows"]] == [True, False, False, False]
    assert all(0 < row["sampling_error"] < 0.2 for row in result["rows"][1:])


def test_the_truth_is_that_of_all_gradients_at_once() -> None:
    layer = make_layer(Case(50, 2100, 6, 4, 3, "bfloat16"))
    truth = LayerTruth.of(layer)
    gradients = domain_gradients(layer.input, layer.grad_output, layer.offsets)
    queries = layer.queries.double()
    torch.testing.assert_close(truth.values, torch.einsum("noi,moi->nm", queries, gradients))
    torch.testing.assert_close(truth.total, gradients.sum(0))
    torch.testing.assert_close(truth.gradient_norms.flatten(), gradients.flatten(1).norm(dim=1))
    torch.testing.assert_close(truth.query_norms.flatten(), queries.flatten(1).norm(dim=1))


def add_methods(monkeypatch: pytest.MonkeyPatch, **methods: Method) -> None:
    few = {name: gpu_methods()[name] for name in (PLAIN, "tikmix_fast")}
    monkeypatch.setattr(gpu_ops, "gpu_methods", lambda projection: {**few, **methods})


def test_a_wrong_answer_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_methods()["tikmix_fast"].prepare

    def wrong(layer) -> Callable[[], Answer]:
        run = right(layer)
        return lambda: Answer(run().values.flip(1), None)

    add_methods(monkeypatch, broken=Method(wrong, ours=True), missing=Method(lambda layer: [][1]))
    result = measure_gpu_case(Rehearsal(), EXACT, CEILINGS, rounds=1)
    assert list(result["wrong"]) == ["broken"]
    assert "influence: error" in result["wrong"]["broken"]
    assert result["skipped"]["missing"] == "IndexError: list index out of range"
    assert not {"broken", "missing"} & {row["method"] for row in result["rows"]}


@pytest.mark.usefixtures("quick")
def test_cases_that_are_there_are_not_measured_again_and_what_crashed_is_left_out() -> None:
    saved: list[str] = []
    content: dict[str, Any] = {}
    run_ops(Rehearsal(), content, 60, lambda content: saved.append(json.dumps(content)), TINY_GPU_CASES[:1])
    assert [case["case"] for case in content["cases"]] == [TINY_GPU_CASES[0].case.name]
    tried = [json.loads(each).get("trying", {}).get("what") for each in saved]
    assert {"ceilings", PLAIN, "tikmix_fast", "timing"} <= set(tried)
    assert tried[-1] is None

    first = content["cases"][0]
    second = TINY_GPU_CASES[1].case.name
    content["trying"] = {"case": second, "what": "tikmix_fast", "why": "CUDA error"}  # as a dead process leaves it
    run_ops(Rehearsal(), content, 60, never, TINY_GPU_CASES[:2])
    assert content["cases"][0] is first
    assert content["cases"][1]["skipped"]["tikmix_fast"] == "crashed: CUDA error"
    assert "tikmix_fast, influence only" in {row["method"] for row in content["cases"][1]["rows"]}
    assert content["crashed"] == [{"case": second, "what": "tikmix_fast", "why": "CUDA error"}]

    third = TINY_GPU_CASES[2].case.name
    content["trying"] = {"case": third, "what": "timing"}
    run_ops(Rehearsal(), content, 60, never, TINY_GPU_CASES)
    assert content["left_out"] == [{"case": third, "why": "crashed: no reason known"}]


def test_no_case_begins_when_the_time_is_up() -> None:
    content: dict[str, Any] = {"ceilings": CEILINGS}
    run_ops(Rehearsal(), content, 0, never, TINY_GPU_CASES)
    assert content["cases"] == []
    assert [each["why"] for each in content["left_out"]] == ["the time was up"] * 3


class LostDevice(Rehearsal):
    """A device on which nothing runs any more after the first method."""

    def synchronize(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_lost_device_ends_the_process_and_leaves_the_method_that_lost_it() -> None:
    content: dict[str, Any] = {"ceilings": CEILINGS}
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_ops(LostDevice(), content, 60, never, TINY_GPU_CASES)
    assert content["trying"]["what"] == PLAIN


class FakeWatch:
    """Stands for a clock that the work itself moves."""

    now = 0.0

    def start(self) -> None:
        self.begin = FakeWatch.now

    def stop(self) -> None:
        self.end = FakeWatch.now

    def seconds(self) -> float:
        return self.end - self.begin


class FakeDevice(Rehearsal):
    def stopwatch(self) -> FakeWatch:
        return FakeWatch()


def test_the_devices_own_clock_is_read_and_inputs_take_turns() -> None:
    used: list[str] = []

    def work(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            used.append(name)
            FakeWatch.now += seconds * (10 if len(used) > 20 else 1)  # the clocks drop: pairs see through that

        return run

    functions = {"a": [work("a0", 2.0), work("a1", 2.0)], "b": [work("b", 1.0)]}
    timings = time_in_turn(FakeDevice(), functions, rounds=20, warm_up=2)
    assert timings.rounds == 20
    assert timings.summary("a", "b")["ratio_interval"] == [2, 2]
    assert used.count("a0") == used.count("a1") == 11
    orders = {tuple(each[0] for each in used[i : i + 2]) for i in range(0, 44, 2)}
    assert orders == {("a", "b"), ("b", "a")}
    assert np.all(timings.cpu["a"] >= 0)
    with pytest.raises(ValueError, match="functions must hold at least one entry"):
        time_in_turn(FakeDevice(), {}, rounds=1)


def test_short_time_still_gives_an_interval() -> None:
    timings = time_in_turn(Rehearsal(), {"a": [lambda: None]}, rounds=50, seconds=0.0)
    assert timings.rounds == 6


@pytest.mark.usefixtures("quick")
def test_rows_hold_shares_of_the_ceilings() -> None:
    result = measure_gpu_case(Rehearsal(), EXACT, CEILINGS, rounds=6)
    case, rows = EXACT.case, {row["method"]: row for row in result["rows"]}
    ours, plain = rows["tikmix_fast"], rows[PLAIN]
    assert result["floor_seconds"] == max(case.useful_flops / 1e10, case.least_bytes / 1e9)
    assert ours["floor_ratio"] == pytest.approx(ours["seconds"] / result["floor_seconds"])
    assert ours["peak_share"] == pytest.approx(case.useful_flops / ours["seconds"] / 1e10)
    assert plain["bandwidth_share"] == pytest.approx(case.plain_bytes / plain["seconds"] / 1e9)
    assert (plain["ratio"], plain["floor_ratio"], plain["gives"]) == (1, None, ["total"])
    assert result["input_sets"] > 1  # one set would stay in the cache


def test_the_cases_are_those_of_the_issue() -> None:
    goals = [(bar.case.name, bar.measure, bar.bar, bar.aim) for bar in GPU_CASES if bar.bar is not None]
    assert goals == [
        ("bf16 T=16384 O=4096 I=4096 m=4 n=9", "ratio", 1.12, 1.05),
        ("bf16 T=65536 O=4096 I=4096 m=26 n=9", "ratio", 1.15, 1.06),
        ("bf16 T=16384 O=4096 I=4096 m=26 n=9", "ratio", 1.5, 1.25),
        ("bf16 T=65536 O=14336 I=4096 m=26 n=9", "scratch", 64e6, 0.0),
        ("bf16 T=16384 O=4096 I=4096 m=26 n=9, projected k=64", "floor", 1.3, 1.15),
    ]
    names = [bar.case.name for bar in GPU_CASES]
    assert len(set(names)) == len(names)
    assert any("fp32" in name for name in names)
    assert any("m=64 n=32" in name for name in names)
    assert any("O=768" in name for name in names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="no CUDA device is visible"):
        find_device()
    assert find_device(rehearse=True).describe() == {"name": "rehearsal"}


def test_missing_tools_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    content: dict[str, Any] = {}
    run_sanitizer(content, 5, never, root=tmp_path, tool="memcheck")
    assert content == {"why_not": "compute-sanitizer is not on PATH"}


def tool(tmp_path, name: str, script: str) -> None:
    path = tmp_path / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo fine", {"clean": True, "output": "fine\n"}),
        ("echo found; exit 86", {"clean": False, "output": "found\n"}),
        ("echo Device not supported; exit 1", {"why_not": "compute-sanitizer does not support this device or driver"}),
        ("exec sleep 9", {"why_not": "stopped after 1 s"}),
    ],
)
def test_what_the_sanitizer_says_is_kept(monkeypatch, tmp_path, script: str, expected: dict[str, Any]) -> None:
    tool(tmp_path, "compute-sanitizer", script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    content: dict[str, Any] = {}
    run_sanitizer(content, 1, never, root=tmp_path, tool="racecheck")
    assert expected.items() <= content.items()
    assert ("clean" in content) == ("clean" in expected)


@pytest.mark.usefixtures("quick")
def test_the_profile_names_kernels(monkeypatch, tmp_path) -> None:
    line = "  kernel(float *) (8, 1, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0"
    tool(tmp_path, "ncu", f'echo "{line}"; echo "    Duration    us    12.5"')
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    content: dict[str, Any] = {}
    run_profile(Rehearsal(), content, 30, never, folder=tmp_path)
    assert content["ncu"] == {"kernels": [{"kernel": "kernel(float *)", "Duration": "12.5 us"}]}
    assert content["kernels"]
    assert "tikmix_fast" in (tmp_path / "profile-torch.txt").read_text()
    assert "trying" not in content


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_clocks_of_no_card(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("benchmarks.gpu.device._smi_command", lambda fields: ["nvidia-smi"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_smi(("a",)) is None
    tool(tmp_path, "nvidia-smi", "echo '580.1, 1980'")
    assert read_smi(("driver", "clock")) == {"driver": 580.1, "clock": 1980.0}
    assert read_smi(("driver",)) is None
