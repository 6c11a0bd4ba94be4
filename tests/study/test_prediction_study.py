"""The prediction study runs, resumes, and its scores mean what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.study.prediction import report
from benchmarks.study.prediction.__main__ import PARTS, main, run
from benchmarks.study.prediction.calibration import covered
from benchmarks.study.prediction.settings import SETTINGS


@pytest.mark.slow
def test_the_quick_study_stores_every_part_and_does_not_repeat_it(tmp_path: Path) -> None:
    arguments = ["--quick", "--seeds", "3", "--out", str(tmp_path / "parts"), "--results", str(tmp_path)]
    main(arguments)
    parts = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*-3.json")}
    assert set(parts) == {f"{part}-3.json" for part in PARTS}
    content = json.loads((tmp_path / "prediction.json").read_text())
    scores = content["counterfactual"]["3"]["validation"]
    assert set(scores) == {"1/1", "1/2", "0.1/1", "0.1/2", "1/3"}
    # Loss changes are paired: two runs on other sequences of a domain agree about which domain helps.
    assert all(cell["a second real run"] > 0.4 for cell in scores.values())
    assert scores["1/1"]["adam"] > 0.2
    assert np.mean(content["additivity"]["3"]["r"]) > 0.4
    assert 0.8 < content["calibration"]["3"]["adam, 2 splits"]["share"] <= 1
    assert (tmp_path / "prediction.png").stat().st_size > 10_000

    main(arguments)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*-3.json")} == parts
    with pytest.raises(ValueError, match="must hold results of the same settings"):
        run(SETTINGS["small"], [3], [], tmp_path / "parts")


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_intervals_of_drawn_measurements_hold_the_truth(noise: float) -> None:
    random = np.random.default_rng(0)
    n, pool_task, m, pool_domain = 3, 40, 4, 60
    # Bilinear, as influence is: noise of the tasks, of the domains, and of both.
    task = 1 + noise * random.normal(size=(n, pool_task, 1, 1))
    table = task * random.normal(1, 0.3, (1, 1, m, pool_domain)) + 0.1 * random.normal(
        size=(n, pool_task, m, pool_domain)
    )
    training = SETTINGS["small"].training
    truth = table.mean((1, 3))
    share = np.mean([covered(table, truth, 3, training, 256.0, random) for _ in range(300)])
    assert 0.92 < share < 0.98
    shifted = np.mean([covered(table, truth + 0.5, 3, training, 256.0, random) for _ in range(50)])
    assert shifted < share - 0.1


def test_a_method_that_knows_the_gains_scores_one_and_the_ceiling_is_the_second_run() -> None:
    one = np.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
    two = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    stored = {
        "gains": {"validation": {"1/10": [one.tolist(), two.tolist()]}},
        "influence": {"knows": one.tolist(), "opposite": (-one).tolist()},
    }
    scores = report.counterfactual_scores(stored, None)["validation"]["1/10"]
    assert scores[report.SECOND_RUN] == pytest.approx((1 + 0.5) / 2)
    assert scores["knows"] == pytest.approx((1 + scores[report.SECOND_RUN]) / 2)
    assert scores["opposite"] == pytest.approx(-scores["knows"])


def test_the_ceiling_of_additivity_is_reached_by_a_perfect_prediction() -> None:
    random = np.random.default_rng(1)
    count, noise = 20_000, (0.3, 0.8)
    truth = random.normal(size=(2, count))
    stored = {
        "predicted": (truth + noise[0] * random.normal(size=truth.shape)).tolist(),
        "measured": (truth + noise[1] * random.normal(size=truth.shape)).tolist(),
        "noise_predicted": [noise[0] ** 2] * 2,
        "noise_measured": [noise[1] ** 2] * 2,
        "tokens_per_mixture": 1.0,
        "tokens_per_domain": 1.0,
    }
    scores = report.additivity_scores(stored)
    assert scores["r"] == pytest.approx(scores["ceiling"], abs=0.01)
    assert scores["ceiling"][0] == pytest.approx(1 / np.sqrt(1.09 * 1.64), abs=0.01)
    # Noise variances 0.09 and 0.64 over f: (1 + 0.09 / f) (1 + 0.64 / f) = 0.97 ** -2 at f = 11.9.
    assert scores["times_tokens_for_bar"] == pytest.approx(11.9, rel=0.08)
