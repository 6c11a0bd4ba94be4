"""Each part of the prediction study on a tiny model, against what it must give."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.study.prediction.additivity import additivity
from benchmarks.study.prediction.calibration import calibration, influence_of_pools
from benchmarks.study.prediction.counterfactual import counterfactual, gains, losses, measure_method, optimizer_step
from benchmarks.study.prediction.settings import Method, PredictionSettings
from benchmarks.study.prediction.subject import Subject, draw, train
from tikmix_fast import Adam
from tikmix_fast.demo.corpora import Corpora
from tikmix_fast.demo.settings import DemoSettings


@pytest.fixture
def subject(settings: DemoSettings, corpora: Corpora, tmp_path: Path) -> Subject:
    small = PredictionSettings(
        settings, checkpoint=8, coast_steps=2, decay_steps=2, path_steps=(2,), methods=(Method("adam"),),
        validation_rows=4, unseen_rows=4, domain_rows=8, fisher_rows=6, batch_rows=6, steps=(1, 2), rates=(1.0,),
        mixtures=6, mixture_rows=64, additivity_rows=64, pool_domain=3, pool_task=4, repetitions=4,
    )  # fmt: skip
    return train(small, 3, corpora, tmp_path)


def test_the_checkpoint_is_read_again(subject: Subject, corpora: Corpora, tmp_path: Path) -> None:
    again = train(subject.settings, 3, corpora, tmp_path)
    assert again.arm.step == subject.arm.step == 8
    assert len(again.path) == 1
    assert losses(again.arm.model, again.validation) == pytest.approx(losses(subject.arm.model, subject.validation))


def test_gains_are_those_of_steps_taken_by_hand(subject: Subject) -> None:
    cells = gains(subject, (1.0,), (1, 2))
    assert set(cells) == {"validation", "unseen"}
    random = np.random.default_rng([3, 5, 1, 2])  # second draw, third domain
    branch = subject.arm.branch()
    for _ in range(2):
        batch = draw(subject.domains["noise"], subject.arm.settings.batch, random)
        optimizer_step(branch, batch, subject.arm.learning_rate())
    decrease = losses(subject.arm.model, subject.validation) - losses(branch.model, subject.validation)
    assert np.array(cells["validation"]["1/2"])[1, :, 2] == pytest.approx(decrease, abs=1e-6)


@pytest.mark.parametrize("weights", ["current", "averaged", "decayed", "path", "coasted"])
def test_influence_is_measured_at_the_weights_that_a_method_names(subject: Subject, weights: str) -> None:
    before = losses(subject.arm.model, subject.validation)
    values = measure_method(subject, Method("identity", weights=weights))
    assert values.shape == (2, 3)
    assert losses(subject.arm.model, subject.validation) == pytest.approx(before)
    differs = not np.allclose(values, measure_method(subject, Method("identity")))
    assert differs == (weights != "current")


def test_counterfactual_holds_gains_and_every_method(subject: Subject) -> None:
    result = counterfactual(subject)
    assert list(result["influence"]) == ["adam"]
    assert set(result["gains"]["unseen"]) == {"1/1", "1/2"}


def test_additivity_predicts_the_influence_of_mixtures(subject: Subject) -> None:
    result = additivity(subject)
    predicted, measured = np.array(result["predicted"]), np.array(result["measured"])
    assert predicted.shape == measured.shape == (2, 6)
    assert np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(predicted, measured, strict=True)]) > 0.7
    assert result["tokens_per_mixture"] == 64 * subject.arm.settings.model.length


def test_the_table_of_the_pools_averages_to_one_measurement(subject: Subject) -> None:
    table = influence_of_pools(subject, Adam(floor=1.0))
    assert table.shape == (2, 4, 3, 3)
    # The same draws, as pools of one micro-batch each: influence is bilinear.
    training = subject.settings.training
    whole = dataclasses.replace(
        subject.settings,
        training=dataclasses.replace(training, task_rows=4 * training.task_rows, domain_rows=3 * training.domain_rows),
        pool_task=1,
        pool_domain=1,
    )
    subject.settings = whole
    assert influence_of_pools(subject, Adam(floor=1.0))[:, 0, :, 0] == pytest.approx(table.mean((1, 3)), rel=1e-3)


def test_calibration_counts_intervals_for_both_preconditioners(subject: Subject) -> None:
    result = calibration(subject)
    assert result["cells"] == 6
    assert len(result["shares"]) == 2  # two splits in both settings here
    assert all(0 <= share <= 1 for shares in result["shares"].values() for share in shares)
