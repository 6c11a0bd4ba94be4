"""Both arms end to end on small text: fair to each other, reproducible, and steered the right way."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tikmix_fast.demo import demonstration
from tikmix_fast.demo.arm import Arm
from tikmix_fast.demo.corpora import Corpora, Sequences
from tikmix_fast.demo.demonstration import demonstrate, task_losses, work
from tikmix_fast.demo.measuring import measure
from tikmix_fast.demo.results import DemoResult
from tikmix_fast.demo.settings import DemoSettings
from tikmix_fast.demo.state import DemoState


@pytest.fixture
def result(settings: DemoSettings, corpora: Corpora) -> DemoResult:
    return demonstrate(settings, corpora)


def test_the_uniform_arm_is_an_ordinary_run(settings: DemoSettings, corpora: Corpora, result: DemoResult) -> None:
    arm = Arm(settings, {name: Sequences(text, 16) for name, text in corpora.domains.items()})
    while arm.step < settings.steps:
        arm.train_step()
    reported = {name: Sequences(task.report, 16) for name, task in corpora.tasks.items()}
    assert result.uniform.final == task_losses(arm.model, reported)
    assert result.uniform.drawn == arm.drawn


def test_both_arms_see_the_same_number_of_sequences_and_share_the_first_stage(result: DemoResult) -> None:
    assert sum(result.tikmix.drawn.values()) == sum(result.uniform.drawn.values()) == 24 * 4
    assert result.tikmix.losses[0] == result.uniform.losses[0]
    assert [step for step, _ in result.tikmix.losses] == [8, 16, 24]
    assert result.tikmix.losses[1] != result.uniform.losses[1]
    assert (
        result.tikmix.weights[0]
        == result.uniform.weights[0]
        == (0, pytest.approx({"prose": 1 / 3, "code": 1 / 3, "noise": 1 / 3}))
    )
    assert [step for step, _ in result.tikmix.weights] == [0, 8, 16]


def test_the_mixture_moves_to_what_helps_and_it_does_help(settings: DemoSettings, corpora: Corpora) -> None:
    result = demonstrate(replace(settings, steps=90, diversity=0.5, floor=0.02), corpora)
    assert all(boundary.success for boundary in result.boundaries)
    for boundary in result.boundaries:
        assert boundary.weights["prose"] > 0.5
        assert boundary.weights["noise"] < 0.15
        assert boundary.matrix["prose", "prose"] > boundary.matrix["prose", "noise"]
    assert result.tikmix.drawn["prose"] > result.uniform.drawn["prose"]
    assert result.change(("prose",)) < -0.01


def test_a_run_can_be_repeated(settings: DemoSettings, corpora: Corpora, result: DemoResult) -> None:
    again = demonstrate(settings, corpora)
    assert again.tikmix == result.tikmix
    other = demonstrate(replace(settings, seed=1), corpora)
    assert other.tikmix.final != result.tikmix.final


class Interruption(Exception):
    pass


def test_an_interrupted_run_goes_on_bit_for_bit(
    settings: DemoSettings, corpora: Corpora, result: DemoResult, tmp_path
) -> None:
    path = tmp_path / "resume.safetensors"
    amounts: list[float] = []

    def run(calls: int) -> DemoResult:
        left = iter(range(calls))
        amounts.clear()

        def progress(what: str, amount: float) -> None:
            amounts.append(amount)
            if next(left, None) is None:
                raise Interruption

        return demonstrate(settings, corpora, progress, DemoState(path, settings, corpora, every=3))

    for calls in (5, 4, 9, 1, 12, 3, 7, 11):  # in every part of the run
        with pytest.raises(Interruption):
            run(calls)
    again = run(1000)
    assert sum(amounts) == pytest.approx(work(settings, corpora))
    assert (again.tikmix, again.uniform) == (result.tikmix, result.uniform)
    assert len(again.tikmix.parameters) == len(again.uniform.parameters) == 64
    assert [each.to_dict() for each in again.boundaries] == [each.to_dict() for each in result.boundaries]


def test_what_is_measured_right_after_an_interruption_is_the_same(
    settings: DemoSettings, corpora: Corpora, result: DemoResult, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "resume.safetensors"
    calls = []

    def measure_every_second_time(*args):
        calls.append(len(calls))
        if len(calls) % 2:
            raise Interruption
        return measure(*args)

    monkeypatch.setattr(demonstration, "measure", measure_every_second_time)
    for _ in result.boundaries:
        with pytest.raises(Interruption):
            demonstrate(settings, corpora, state=DemoState(path, settings, corpora, every=1))
    again = demonstrate(settings, corpora, state=DemoState(path, settings, corpora, every=1))
    assert [each.to_dict() for each in again.boundaries] == [each.to_dict() for each in result.boundaries]
    assert again.tikmix == result.tikmix


def test_the_state_of_another_run_is_refused(settings: DemoSettings, corpora: Corpora, tmp_path) -> None:
    path = tmp_path / "resume.safetensors"
    demonstrate(settings, corpora, state=DemoState(path, settings, corpora))
    with pytest.raises(
        ValueError, match=r"resume\.safetensors: belongs to an interrupted run with other settings: delete"
    ):
        DemoState(path, replace(settings, seed=1), corpora)
    other = replace(corpora, domains={name: text[:-1] for name, text in corpora.domains.items()})
    with pytest.raises(ValueError, match=r"resume\.safetensors: belongs to an interrupted run with other text"):
        DemoState(path, settings, other)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"resume\.safetensors: is damaged, cut short .* delete it"):
        DemoState(path, settings, corpora)


def test_progress_adds_up_to_the_work(settings: DemoSettings, corpora: Corpora) -> None:
    done: list[tuple[str, float]] = []
    demonstrate(settings, corpora, lambda what, amount: done.append((what, amount)))
    assert sum(amount for _, amount in done) == pytest.approx(work(settings, corpora))
    assert [what for i, (what, _) in enumerate(done) if i == 0 or done[i - 1][0] != what] == [
        "both arms",
        "TiKMiX-D",
        "uniform",
    ]


def test_results_survive_their_file(result: DemoResult, tmp_path) -> None:
    result.environment = {"python": "3"}
    path = result.save(tmp_path / "results.json")
    again = DemoResult.load(path)
    assert again.to_dict() == result.to_dict()
    assert (again.settings, again.tikmix, again.steered) == (result.settings, result.tikmix, ("prose",))
    assert np.array_equal(again.boundaries[0].matrix.values, result.boundaries[0].matrix.values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "results.json: is not JSON, or cut short: Expecting"),
        ("[]", "results.json: not the result of a demonstration"),
        (json.dumps({"format": "tikmix_fast.demo", "version": 1}), "results.json: .* lacks the field 'settings'"),
    ],
)
def test_other_files_are_refused(tmp_path, content: str, message: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        DemoResult.load(tmp_path / "results.json")


def test_the_loss_of_a_task_is_the_mean_over_all_its_bytes(settings: DemoSettings, corpora: Corpora) -> None:
    arm = Arm(settings, {name: Sequences(text, 16) for name, text in corpora.domains.items()})
    text = Sequences(corpora.tasks["code"].report, 16)
    expected = torch.stack([arm.model.loss(item[None]) for item in text.all()]).mean().item()
    assert task_losses(arm.model, {"code": text})["code"] == pytest.approx(expected, rel=1e-5)
    few = torch.stack([arm.model.loss(text[row][None]) for row in (0, len(text) // 2)]).mean().item()
    assert task_losses(arm.model, {"code": text}, rows=2)["code"] == pytest.approx(few, rel=1e-5)


def test_a_diverging_run_stops(settings: DemoSettings, corpora: Corpora) -> None:
    with pytest.raises(FloatingPointError, match=r"the loss of task 'prose' is|not finite"):
        demonstrate(replace(settings, learning_rate=1e30, weight_decay=1e30), corpora)
