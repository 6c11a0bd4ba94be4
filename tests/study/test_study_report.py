"""The report: paired by seed, intervals as textbooks have them, goals judged on the numbers shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.study import report
from benchmarks.study.comparisons import Results, changes, interval, plateau
from benchmarks.study.pictures import mixture_at
from benchmarks.study.run import FORMAT

DOMAINS = ("docstrings", "python", "fragments", "noise")


def run(steered: float, held_out: float, *, noise: float = 0.25, flops: float = 0.0, **other: Any) -> dict[str, Any]:
    rest = (1 - noise) / 3
    mixture = dict(zip(DOMAINS, (rest, rest, rest, noise), strict=True))
    return {
        "format": FORMAT, "settings": {"main": {"steps": 10}}, "fingerprint": "f", "steered": ["a", "b"],
        "final": {"a": steered, "b": 2 * steered, "c": held_out},
        "mixtures": [{"step": 0, "domains": dict.fromkeys(DOMAINS, 0.25)}, {"step": 5, "domains": mixture}],
        "drawn": dict.fromkeys(DOMAINS, 30), "sequences": dict.fromkeys(DOMAINS, 10),
        "flops": {"mixing": flops, "training": 1000.0},
        "log": [{"step": 5, "influence": [[1.0, 0.5, 0.2, 0.0], [0.5, 2.0, -1.0, 0.0]]}],
        **other,
    }  # fmt: skip


@pytest.fixture
def results() -> Results:
    return {
        "uniform": {0: run(1.0, 2.0), 1: run(1.2, 2.2), 2: run(0.9, 1.9)},
        "tikmix-d": {s: run(x, 2.0, noise=0.02, flops=100.0) for s, x in ((0, 0.95), (1, 1.13), (2, 0.86))},
        "regmix 16": {s: run(x, 2.0, flops=160.0) for s, x in ((0, 1.1), (1, 1.3), (2, 1.0))},
        "regmix 64": {s: run(x, 2.0, flops=640.0) for s, x in ((0, 0.99), (1, 1.19), (2, 0.885))},
        "regmix 256": {s: run(x, 2.0, flops=2560.0) for s, x in ((0, 0.985), (1, 1.2), (2, 0.88))},
    }


def test_changes_are_paired_by_seed(results: Results) -> None:
    paired = changes(results, "tikmix-d", "uniform", ["a", "b"])
    assert paired == pytest.approx([0.95 / 1.0 - 1, 1.13 / 1.2 - 1, 0.86 / 0.9 - 1])
    del results["uniform"][1]
    assert changes(results, "tikmix-d", "uniform", ["a"]) == pytest.approx([-0.05, 0.86 / 0.9 - 1])


def test_the_interval_is_that_of_a_t_test() -> None:
    values = np.array([0.3, 0.1, 0.4, 0.15, 0.2])
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values) == pytest.approx(((low + high) / 2, (high - low) / 2))
    mean, half = interval(values[:1])
    assert mean == 0.3
    assert np.isnan(half)


def test_the_plateau_is_the_cheapest_that_is_not_reliably_worse(results: Results) -> None:
    assert plateau(results) == "regmix 64"
    results["regmix 64"] = {s: run(x, 2.0) for s, x in ((0, 1.0), (1, 1.22), (2, 0.9))}  # a steady 1.5 to 2.3% worse
    assert plateau(results) == "regmix 256"
    assert plateau({"uniform": results["uniform"]}) is None


def test_goals(results: Results) -> None:
    rows = [line.split("|")[1:4] for line in report.bar_table(results).splitlines()[2:]]
    # Changes of -3.6, -5.8 and -2.3% from regmix 256 have an interval that reaches above 0.
    assert [reached.strip() for *_, reached in rows] == ["yes", "yes", "yes", "no", "yes", "yes", "yes"]
    assert rows[1][1].strip() == "16%"
    assert ["regmix 16" in rows[2][0], "regmix 256" in rows[3][0]] == [True, True]
    assert rows[6][1].strip() == "0.08 ± 0.00"
    for seed in results["tikmix-d"]:
        results["tikmix-d"][seed] = run(1.0 + 0.1 * seed, 2.1, noise=0.2, flops=200.0)
    rows = [line.split("|")[3].strip() for line in report.bar_table(results).splitlines()[2:]]
    assert rows == ["no"] * 7


def test_mixtures_hold_from_their_step_on() -> None:
    mixtures = [{"step": 0, "domains": {"a": 1.0, "b": 0.0}}, {"step": 3, "domains": {"a": 0.25, "b": 0.75}}]
    weights = mixture_at(mixtures, ["b", "a"], np.arange(5))
    assert weights.tolist() == [[0, 0, 0, 0.75, 0.75], [1, 1, 1, 0.25, 0.25]]


def test_a_folder_is_read_and_written(results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arm, runs in results.items():
        for seed, content in runs.items():
            path = tmp_path / f"{arm.replace(' ', '-')}-{seed}.json"
            path.write_text(json.dumps({**content, "arm": arm, "seed": seed}))
    (tmp_path / "proxies-0.json").write_text("[[1.0]]")
    (tmp_path / "environment.json").write_text("{}")
    text = report.write(report.load(tmp_path), tmp_path).read_text()
    assert "| tikmix-d | 3 | -5.1% ± 1.7% | -1.3% ± 18.0% | 0.08 | 1.31 | 3.0 | 1e+02 | 10.0% |" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"changes.png", "weights.png", "influence.png"}
    assert text.index("| tikmix-d |") < text.index("| regmix 64 |") < text.index("| uniform |")

    summary = tmp_path / "kept"
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), "--out", str(summary)])
    report.main()
    assert (summary / "report.md").read_text() == text
    (summary / "reading.md").write_text("What it means.")
    monkeypatch.setattr(sys, "argv", ["report.py", str(summary / "summary.json")])
    report.main()
    assert (summary / "report.md").read_text() == text.replace("# Study\n", "# Study\n\nWhat it means.\n")

    (tmp_path / "ado-0.json").write_text(json.dumps({**run(1, 1), "arm": "ado", "seed": 0, "fingerprint": "g"}))
    with pytest.raises(ValueError, match="results of one study; it holds those of 2"):
        report.load(tmp_path)
