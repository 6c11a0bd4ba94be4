"""The tables of docs/ and the numbers of README are those of the results."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "report.py"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_report", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_holds_every_task_with_means_over_seeds(report: ModuleType) -> None:
    def seed(number: int, ours: float) -> dict:
        return {
            "seed": number,
            "wall_seconds": 120.0,
            "seconds": {"training": 90.0, "measuring": 30.0},
            "uniform": {"a": 2.0, "b": 4.0, "c": 1.0},
            "tikmix": {"a": ours, "b": 3.0, "c": 1.1},
        }

    table = report.demo_table(
        {
            "seeds": [seed(0, 1.5), seed(1, 1.7)],
            "steered": ["a", "b"],
            "held_out": ["c"],
            "sources": {"a": "text a", "b": "text b", "c": "text c"},
            "settings": {"steps": 10},
            "environment": {
                "machine": {"processor": "P", "threads": 2},
                "packages": {"torch": "2"},
                "commit": "0123456789abcdef with changes",
            },
            "date": "2026-01-01",
        }
    )
    assert "| a (steered for: text a) | 2.000 | 1.600 | -20.0 % ± 7.1 |" in table
    assert "| **mean, steered for** | 3.000 | 2.300 | -23.3 % ± 2.4 |" in table
    assert "| c (held out: text c) | 1.000 | 1.100 | +10.0 % ± 0.0 |" in table
    assert "2.0 minutes per seed for both arms, of which 25% measuring" in table
    assert "commit 0123456789 with changes" in table


def test_only_what_lies_between_the_marks_is_rewritten(report: ModuleType) -> None:
    text = "before\n<!-- demo:begin -->\nold\n<!-- demo:end -->\nafter\n"
    once = report.rewrite(text, "demo", "new")
    assert once == "before\n<!-- demo:begin -->\nnew\n<!-- demo:end -->\nafter\n"
    assert report.rewrite(once, "demo", "new") == once


@pytest.mark.parametrize("text", ["", "<!-- demo:begin -->", "<!-- demo:end --> <!-- demo:begin -->"])
def test_a_page_without_marks_is_refused(report: ModuleType, text: str) -> None:
    with pytest.raises(ValueError, match="must hold <!-- demo:begin -->"):
        report.rewrite(text, "demo", "new")


def test_every_section_has_its_marks_and_a_sentence_without_results(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(name for names in report.PAGES.values() for name in names) == sorted(report.SECTIONS)
    for page, names in report.PAGES.items():
        text = (PATH.parents[1] / page).read_text(encoding="utf-8")
        for name in names:
            assert "new" in report.rewrite(text, name, "new")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.section("mixture").startswith("No results yet: `python -m benchmarks.run` makes mixture.json and ")
    report.draw_pictures()
    assert list(tmp_path.iterdir()) == []


def test_readme_and_pages_say_what_the_results_say(report: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    report.main()


def test_a_stale_number_and_a_stale_page_are_named(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for page in ("README.md", *report.PAGES):
        text = (PATH.parents[1] / page).read_text(encoding="utf-8")
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(text.replace("not yet run on a GPU", "run on every GPU"), encoding="utf-8")
    (tmp_path / report.RESULTS).parent.mkdir()
    (tmp_path / report.RESULTS).symlink_to(PATH.parent / "results")
    study = tmp_path / "docs" / "study.md"
    study.write_text(report.rewrite(study.read_text(encoding="utf-8"), "demo", "old"), encoding="utf-8")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "README_FACTS", ((("gpu-none-*.json",), lambda: ["not yet run on a GPU"]),))
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    with pytest.raises(SystemExit) as stopped:
        report.main()
    assert "docs/study.md is not what the results say" in str(stopped.value)
    assert "docs/benchmarks.md" not in str(stopped.value)
    assert "README.md must say: not yet run on a GPU" in str(stopped.value)


def test_the_gpu_is_named_when_there_are_results(report: ModuleType) -> None:
    assert report.gpu_status() == ["not yet run on a GPU"]
    assert report.gpu_status({"device": {"name": "NVIDIA X"}}) == ["measured on NVIDIA X"]


def test_sections_hold_tables_of_the_results(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.suites import ALL_SUITES
    from tikmix_fast.benchmarking.suites import BenchSettings, run_suite

    folder = tmp_path / report.RESULTS
    folder.mkdir(parents=True)
    for suite in ("ops", "mixture", "sampler"):
        settings = BenchSettings("tiny", rounds=1, weigh=False)
        (folder / f"{suite}.json").write_text(json.dumps(run_suite(suite, settings, suites=ALL_SUITES)))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    ops = report.section("ops")
    assert ops.count("| **tikmix_fast** |") == 2
    assert "<details><summary>Every method, case by case</summary>\n\n**fp32 T=96 O=40 I=24 m=3 n=2: " in ops
    assert "benchmarks/results/roofline.png" in ops
    mixture = report.section("mixture")
    assert "**TiKMiX-D**" in mixture
    assert "**Sampler, memory**" in mixture
    report.draw_pictures()
    assert (folder / "roofline.png").stat().st_size > 1000
