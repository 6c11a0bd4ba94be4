"""Tables of made-up GPU results, for the end of ``python -m benchmarks.gpu`` and for the docs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.gpu.tables import gpu_bars, gpu_facts, gpu_tables, is_passed

PATH = Path(__file__).parents[2] / "benchmarks" / "report.py"


def row(method: str, ratio: float, gives: list[str], **changes: Any) -> dict[str, Any]:
    return {
        "method": method, "ours": method.startswith("tikmix"), "gives": gives, "seconds": 1e-3 * ratio, "ratio": ratio,
        "ratio_interval": [ratio - 0.01, ratio + 0.01], "flops_per_second": 5e14, "peak_share": 0.7,
        "bytes_per_second": 1e12, "bandwidth_share": 0.25, "floor_ratio": 1.5 * ratio if "influence" in gives else None,
        "scratch_bytes": 1 << 20, "error": 3e-8 if "influence" in gives else None,
        "total_error": 1e-6 if "total" in gives else None, "graph": None, **changes,
    }  # fmt: skip


def case(name: str, measure: str, bar: float | None, aim: float | None, rows: list[dict]) -> dict[str, Any]:
    return {
        "case": name, "measure": measure, "bar": bar, "aim": aim, "tokens_per_domain": 630.2,
        "clocks": {"clocks.sm": 1755.0}, "rows": rows,
        "skipped": {"tikmix_fast, triton fused": "no Triton"}, "wrong": {},
    }  # fmt: skip


@pytest.fixture
def result() -> dict[str, Any]:
    both = ["influence", "total"]
    plain = row("plain weight gradient", 1.0, ["total"], ratio_interval=[1.0, 1.0])
    exact = [plain, row("tikmix_fast", 1.2, both), row("tikmix_fast, cuda fused", 1.04, both),
             row("tikmix_fast, influence only", 0.9, ["influence"])]  # fmt: skip
    scratch = [plain, row("tikmix_fast", 1.1, both, scratch_bytes=0), row("tikmix_fast, cuda fused", 1.3, both)]
    projected = [plain, row("tikmix_fast, countsketch", 0.9, ["influence"]), row("torch, dense", 0.8, ["influence"])]
    graphs = [plain | {"graph": {"seconds": 2e-5, "ratio": 1.0, "ratio_interval": [1, 1]}},
              row("tikmix_fast", 3.0, both, graph={"skipped": "it waits"})]  # fmt: skip
    ops = {
        "ceilings": {"bandwidth": 4.3e12, "flops": {"bfloat16": 7.9e14}, "l2": None, "l2_why_not": "no Triton"},
        "cases": [
            case("fast", "ratio", 1.12, 1.05, exact), case("large", "scratch", 64e6, 0.0, scratch),
            case("small numbers", "floor", 1.3, 1.15, projected), case("short", "ratio", None, None, graphs),
        ],
        "crashed": [], "left_out": [],
    }  # fmt: skip
    step = {
        "case": "a GPT", "parameters": 353e6, "failed": {"with projected influence, k=64": "no memory"}, "clocks": {},
        "bars": {"with exact influence": [1.1, 1.05], "with projected influence, k=64": [1.04, 1.02]},
        "rows": [
            {"method": "step without influence", "ours": False, "seconds": 0.2, "ratio": 1.0, "ratio_interval": None,
             "step_bytes": 1 << 30, "held_bytes": 0},
            {"method": "with exact influence", "ours": True, "seconds": 0.21, "ratio": 1.05,
             "ratio_interval": [1.04, 1.07], "step_bytes": 1 << 31, "held_bytes": 1 << 30},
        ],
    }  # fmt: skip
    tests = {
        "cuda tests/gpu/test_a.py": {"passed": 10, "failed": {"test_a.py::test_x": "it is wrong"},
                                     "skipped": {"why": 2}, "collected": 20, "stopped": "the time was up"},
        "memcheck": {"clean": True, "output": "no errors"},
        "racecheck": {"why_not": "not on PATH"},
    }  # fmt: skip

    def part(finished: bool, **jobs: Any) -> dict[str, Any]:
        return {"commit": "0123456789abcdef", "date": "2026-12-01T10:00:00+00:00", "finished": finished, "jobs": jobs}

    return {
        "suite": "gpu",
        "device": {"name": "NVIDIA H200", "driver_version": "580.1"},
        "environment": {"packages": {"torch": "2.11", "triton": "3.6"}, "nvcc": "13.0.48"},
        "parts": {
            "tests": part(True, **tests),
            "ops": part(False, ops=ops),
            "engine": part(True, engine={"steps": [step]}),
        },
    }


def test_goals(result: dict[str, Any]) -> None:
    rows = {each[0]: each[1:] for each in gpu_bars(result).rows}
    assert rows["fast"] == [
        "x plain", "1.12", "1.05", "1.20 [1.19, 1.21]", "1.04 [1.03, 1.05] (cuda fused)", "missed",
    ]  # fmt: skip
    assert rows["large"] == ["memory besides", "61 MiB", "0 MiB", "0 MiB", "0 MiB", "aim"]
    assert rows["small numbers"][-3:] == ["1.35 (countsketch)", "1.35 (countsketch)", "missed"]
    assert rows["training step with exact influence"][-2:] == ["1.05 [1.04, 1.07]", "aim"]
    assert rows["training step with projected influence, k=64"][-3:] == [
        "not available",
        "not available",
        "not measured",
    ]
    assert "short" not in rows


def test_every_table(result: dict[str, Any]) -> None:
    goals, tests, ceilings, fast, large, small, short, step = gpu_tables(result)
    assert goals.title == "Goals"
    assert tests.rows == [
        ["cuda tests/gpu/test_a.py", "tests", "10", "1", "2"],
        ["memcheck", "clean", "-", "-", "-"],
        ["racecheck", "not on PATH", "-", "-", "-"],
    ]
    assert "cuda tests/gpu/test_a.py: the time was up after 10 of 20 tests" in tests.notes
    assert ["reads from L2", "not measured: no Triton"] in ceilings.rows
    assert fast.title == "fast: 630 tokens per domain, 1755 MHz"
    assert fast.rows[1] == [
        "tikmix_fast", "1.2", "1.20 [1.19, 1.21]", "1.80", "500 (70%)", "1 (25%)", "1 MiB", "3e-8", "1e-6",
    ]  # fmt: skip
    assert fast.notes == ["tikmix_fast, triton fused left out: no Triton"]
    assert short.header[-1] == "from a graph"
    assert [each[-1] for each in short.rows] == ["0.02 ms, 1.00", "-"]
    assert step.rows[1] == ["with exact influence", "210", "1.05 [1.04, 1.07]", "2.05e+03 MiB", "1.02e+03 MiB"]
    assert large.bold == {1, 2}
    assert small.rows[2][0] == "torch, dense"


def test_facts_tell_the_commit_of_every_part(result: dict[str, Any]) -> None:
    assert gpu_facts(result) == (
        "NVIDIA H200, driver 580.1, torch 2.11, triton 3.6, nvcc 13.0.48; tests at 0123456789 on 2026-12-01; "
        "ops at 0123456789 on 2026-12-01 (not finished); engine at 0123456789 on 2026-12-01"
    )
    result["parts"]["ops"]["commit"] = None
    assert "ops at an unknown commit on" in gpu_facts(result)
    assert gpu_facts({"parts": {}}).startswith("unknown device")


def test_passing_is_about_right_answers_and_not_about_speed(result: dict[str, Any]) -> None:
    assert not is_passed(result, ["tests"])  # one failed
    result["parts"]["tests"]["jobs"]["cuda tests/gpu/test_a.py"]["failed"] = {}
    assert is_passed(result, ["tests"])
    result["parts"]["tests"]["jobs"]["memcheck"]["clean"] = False
    assert not is_passed(result, ["tests"])
    assert not is_passed(result, ["ops"])  # not finished
    result["parts"]["ops"]["finished"] = True
    assert is_passed(result, ["ops"])
    result["parts"]["ops"]["jobs"]["ops"]["cases"][1]["wrong"] = {"a": "b"}
    assert not is_passed(result, ["ops"])
    assert not is_passed(result, ["engine"])  # one way failed
    assert not is_passed(result, ["profile"])  # is not there


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_report_gpu", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_says_that_there_are_no_results_or_shows_every_device(
    report: ModuleType, result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    folder = tmp_path / report.RESULTS
    folder.mkdir(parents=True)
    assert report.section("gpu").startswith("No results on a GPU yet: `python -m benchmarks.gpu` makes them")
    (folder / "gpu-nvidia-h200.json").write_text(json.dumps(result))
    other = json.loads(json.dumps(result))
    other["device"]["name"] = "NVIDIA A100"
    for part in other["parts"].values():
        part["date"] = "2026-12-02T10:00:00+00:00"
    (folder / "gpu-nvidia-a100.json").write_text(json.dumps(other))
    text = report.section("gpu")
    assert text.index("**NVIDIA A100**") < text.index("**NVIDIA H200**")
    assert text.count("| fast | x plain | 1.12 | 1.05 |") == 2
    assert text.count("<details><summary>Everything on NVIDIA H200</summary>") == 1
    assert "ops at 0123456789 on 2026-12-01 (not finished)" in text
