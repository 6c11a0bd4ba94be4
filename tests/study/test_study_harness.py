"""The harness: same code for every arm, identical results after a kill, operations counted as by hand."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.study import counting, run
from benchmarks.study.baselines import arms
from benchmarks.study.baselines.dga import DGA
from benchmarks.study.baselines.doge import DoGE
from benchmarks.study.baselines.fixed import uniform
from benchmarks.study.baselines.regmix import RegMix, proxy_losses
from benchmarks.study.baselines.tikmix_d import measuring_flops
from benchmarks.study.problem import Problem, cut_up
from benchmarks.study.settings import SETTINGS, StudySettings
from benchmarks.study.training import Method, Study, Trainee, sequence_losses, train
from tikmix_fast.demo.arm import Arm
from tikmix_fast.demo.gpt import GPT, GPTSettings

MakeStudy = Callable[..., Study]


class KilledError(Exception):
    """Stands for the end of the process."""


def test_a_study_step_is_the_demonstrations(make_study: MakeStudy) -> None:
    study = make_study()
    ours, theirs = (
        Trainee(study.main, study.problem.domains, study.uniform, "cpu"),
        Arm(study.main, study.problem.domains),
    )
    for _ in range(6):
        ours.train_on()
        theirs.train_step()
    assert ours.drawn == theirs.drawn
    for name, value in ours.model.state_dict().items():
        torch.testing.assert_close(value, theirs.model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_step_tells_the_domain_and_loss_of_each_sequence(make_study: MakeStudy) -> None:
    study = make_study()
    arm = Trainee(study.main, study.problem.domains, np.array([0.5, 0.0, 0.25, 0.25]), "cpu")
    before = GPT(study.main.model, study.main.seed)
    domains, losses = arm.train_on()
    assert np.bincount(domains, minlength=4).tolist() == list(arm.drawn.values()) == [2, 0, 1, 1]
    texts = list(study.problem.domains.values())
    for domain, loss in zip(domains, losses, strict=True):
        assert np.isclose(sequence_losses(before, texts[domain].all()).detach().numpy(), loss, atol=1e-5).any()


def test_a_method_sees_every_step_and_its_changes_hold_from_the_next_one(make_study: MakeStudy) -> None:
    study = make_study()
    only = [np.eye(4)[index] for index in range(4)]
    steps_seen: list[tuple[int, set[int]]] = []

    class Switching(Method):
        def update(self, arm):
            return only[1] if arm.step == 10 else None

        def observe(self, step, domains, losses):
            steps_seen.append((step, set(domains.tolist())))

    result = train(study, Switching(only[0]))
    assert steps_seen == [(step, {0} if step <= 10 else {1}) for step in range(1, 25)]
    assert [each["step"] for each in result["mixtures"]] == [0, 10]
    assert result["drawn"] == {"python": 40, "docstrings": 56, "fragments": 0, "noise": 0}
    assert [each["step"] for each in result["curve"]] == [8, 16, 24]
    assert set(result["final"]) == {"numpy docs", "fonttools", "sums"}


FAST = ("odm", "tikmix-d")
"""An arm that learns from every step, and one that measures; the others take minutes together."""


@pytest.mark.parametrize(
    "arm",
    [
        pytest.param(name, marks=[] if name in FAST else pytest.mark.slow)
        for name in arms(SETTINGS["tiny"])
        if name != "regmix 4"
    ],
)
def test_killed_and_resumed_is_identical(
    arm: str, make_study: MakeStudy, tiny: StudySettings, problem: Problem, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    steps = 0
    ordinary = Trainee.take_step

    def counted(trainee: Trainee) -> None:
        nonlocal steps
        steps += 1
        ordinary(trainee)

    monkeypatch.setattr(Trainee, "take_step", counted)
    expected = run.run_arm(tiny, problem, whole, arm, seed=3).read_bytes()

    def dies(trainee: Trainee) -> None:
        nonlocal steps
        steps -= 1
        if steps < 0:
            raise KilledError
        ordinary(trainee)

    monkeypatch.setattr(Trainee, "take_step", dies)
    # The last one dies at the end of the main run, whatever of the proxy runs is kept.
    for allowed in (steps // 10, steps // 2, tiny.main.steps - 1):
        steps = allowed
        with pytest.raises(KilledError):
            run.run_arm(tiny, problem, cut, arm, seed=3)
        assert not run.result_path(cut, arm, 3).exists()
        assert not list(cut.glob(".*"))
    monkeypatch.setattr(Trainee, "take_step", ordinary)
    assert run.run_arm(tiny, problem, cut, arm, seed=3).read_bytes() == expected


def test_what_is_there_is_not_run_again_and_other_settings_are_refused(
    tiny: StudySettings, problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run.run_arm(tiny, problem, tmp_path, "half and half", 0)
    assert path.name == "half-and-half-0.json"
    monkeypatch.setattr(run, "train", None)
    assert run.run_arm(tiny, problem, tmp_path, "half and half", 0) == path
    for settings, text, what in (
        (dataclasses.replace(tiny, update_every=5), problem, "another settings"),
        (tiny, dataclasses.replace(problem, fingerprint="other"), "another fingerprint"),
    ):
        with pytest.raises(ValueError, match=what):
            run.run_arm(settings, text, tmp_path, "half and half", 0)


def test_proxies_are_shared_and_the_smaller_counts_are_the_first_of_the_largest(make_study: MakeStudy) -> None:
    study = make_study()
    few = proxy_losses(study, 3)
    path = study.folder / "proxies-0.json"
    losses = json.loads(path.read_text())["losses"]
    assert len(losses) == 3
    many = proxy_losses(study, 5)
    assert json.loads(path.read_text())["losses"][:3] == losses
    for less, more in zip(few, many, strict=True):
        assert np.array_equal(less, more[:3])
    assert many[1].shape == (5, 2)
    # Other mixtures give other losses.
    assert len(np.unique(many[1][:, 0])) == 5
    longer = dataclasses.replace(study.settings.proxy, steps=study.settings.proxy.steps + 1)
    other = dataclasses.replace(study, settings=dataclasses.replace(study.settings, proxy=longer))
    with pytest.raises(ValueError, match=r"proxies-0\.json holds proxies of other settings"):
        proxy_losses(other, 5)


def test_weights_in_products_are_those_of_the_model() -> None:
    settings = GPTSettings(layers=3, heads=4, width=96, length=128)
    model = GPT(settings, 0)
    matrices = sum(
        each.numel()
        for name, each in model.named_parameters()
        if each.dim() == 2 and name.split(".")[0] in ("blocks", "head")
    )
    assert counting.weights(settings) == matrices == 3 * 12 * 96 * 96 + 256 * 96


def test_operations_by_hand(make_study: MakeStudy) -> None:
    study = make_study()
    weights = 12 * 16**2 + 256 * 16  # 7168
    result = train(study, uniform(study))
    assert result["flops"] == {"mixing": 0.0, "training": 6.0 * weights * 24 * 4 * 32}
    # 2 tasks of 2 x 2 sequences, 2 batches of one sequence of each of 4 domains, products with 2 x 2 splits of tasks.
    assert measuring_flops(study) == 6 * weights * 32 * (2 * 4 + 4 * 2) + 2 * weights * 2 * 4 * 4
    # Changes at steps 4, 8, ..., 20, each with 2 sequences of 4 domains and 2 tasks, and 4 products.
    dga = train(study, DGA(study))
    assert dga["flops"]["mixing"] == 5 * (6 * weights * 32 * 6 * 2 + 2 * weights * 4)
    small = 12 * 8**2 + 256 * 8
    assert DoGE(study).flops == 4 * (6 * small * 32 * 6 * 2 + 2 * small * 4)
    # 4 proxies of 4 steps of 2 sequences, and 2 tasks of 2 sequences forward.
    assert RegMix(study, 4).flops == 4 * (6 * small * 4 * 2 * 32 + 2 * small * 2 * 2 * 32)


def test_cut_up_keeps_pieces_and_loses_their_order() -> None:
    text = np.arange(200, dtype=np.uint8)
    pieces = cut_up(text, 3)
    assert sorted(pieces.tolist()) == list(range(198))
    assert (np.diff(pieces.reshape(-1, 3).astype(int)) == 1).all()
    assert (np.diff(pieces.reshape(-1, 3)[:, 0].astype(int)) == 3).mean() < 0.2


def test_the_scarce_domain_is_scarce(problem: Problem, tiny: StudySettings) -> None:
    lengths = {name: len(text) for name, text in problem.domains.items()}
    assert lengths["docstrings"] == (tiny.short_bytes - 1) // tiny.main.model.length
    assert list(lengths)[-1] == "noise"
    assert problem.own == ("docstrings", "python")
    assert problem.held_out == ("sums",)


def test_an_unknown_arm_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--setting", "tiny", "--out", str(tmp_path), "--arms", "odm", "doremi"])
    with pytest.raises(SystemExit):
        run.main()
    assert "got 'doremi'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_killed_and_run_again(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "benchmarks.study.run", "--setting", "tiny", "--seeds", "7", "--arms", "uniform", "odm",
        "regmix 8", "tikmix-d", "--out",
    ]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    started = subprocess.Popen(
        [*command, str(cut)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not (cut / "odm-7.json").exists():
        assert started.poll() is None
        time.sleep(0.01)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert not (cut / "tikmix-d-7.json").exists()
    subprocess.run([*command, str(cut), "--workers", "2"], check=True, capture_output=True)
    names = sorted(path.name for path in whole.glob("*-7.json"))
    assert names == ["odm-7.json", "proxies-7.json", "regmix-8-7.json", "tikmix-d-7.json", "uniform-7.json"]
    for name in names:
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
