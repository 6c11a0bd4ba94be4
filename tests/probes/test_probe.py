"""Probe labels: equal to a loop written by hand, from one state, with common random numbers, undone afterwards."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.study.probe_arm import probe_arm
from tikmix_fast.demo.arm import Arm
from tikmix_fast.demo.corpora import Corpora, Sequences
from tikmix_fast.demo.demonstration import task_losses
from tikmix_fast.demo.gpt import GPT
from tikmix_fast.demo.settings import DemoSettings
from tikmix_fast.probes.probe import ProbeLabels, probe

MIXTURES = np.array([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.2, 0.2, 0.6], [0.25, 0.25, 0.5]])


@pytest.fixture
def text(settings: DemoSettings, corpora: Corpora) -> dict[str, dict[str, Sequences]]:
    length = settings.model.length
    return {
        "domains": {name: Sequences(each, length) for name, each in corpora.domains.items()},
        "tasks": {name: Sequences(each.measure, length) for name, each in corpora.tasks.items()},
    }


@pytest.fixture
def arm(settings: DemoSettings, text) -> Arm:
    arm = Arm(settings, text["domains"])
    for _ in range(6):
        arm.train_step()
    return arm


def state(arm: Arm):
    return copy.deepcopy((arm.step, arm.model.state_dict(), arm.optimizer.state_dict(), arm.sampler.state_dict()))


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_labels_are_those_of_a_loop_by_hand(arm: Arm, settings: DemoSettings, text) -> None:
    labels = probe_arm(arm, text["tasks"], MIXTURES, steps=3, repeats=2)
    every = torch.cat([each.all() for each in text["domains"].values()])
    for repeat in range(2):
        for index, mixture in enumerate(MIXTURES):
            model = GPT(settings.model, seed=99)
            model.load_state_dict(arm.model.state_dict())
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            optimizer.load_state_dict(copy.deepcopy(arm.optimizer.state_dict()))
            sampler = arm.branch().sampler
            draws = iter(sampler)
            for _ in range(repeat * 3 * 4):
                next(draws)
            sampler.set_weights(mixture)
            before = task_losses(model, text["tasks"])
            for step in range(6, 9):
                # A rise over 4 steps, then a cosine over the other 20 to a tenth of 0.01.
                optimizer.param_groups[0]["lr"] = 0.01 * (0.55 + 0.45 * math.cos(math.pi * (step - 4) / 20))
                optimizer.zero_grad()
                model.loss(every[[next(draws) for _ in range(4)]]).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            after = task_losses(model, text["tasks"])
            assert labels.runs[repeat, index].tolist() == [before[name] - after[name] for name in before]
    assert np.array_equal(labels.labels, (labels.runs[0] + labels.runs[1]) / 2)
    assert labels.stderr == pytest.approx(np.abs(labels.runs[0] - labels.runs[1]) / 2)
    assert labels.runs[0].tolist() != labels.runs[1].tolist()
    # Training on code lowers the loss on code the most.
    assert labels.labels[:, 1].argmax() == 1


def test_an_arm_is_left_as_it_was_and_goes_on_as_it_would_have(arm: Arm, text) -> None:
    twin = arm.branch()
    before = state(arm)
    torch_state, gradient = torch.get_rng_state(), [each.grad for each in arm.model.parameters()]
    probe_arm(arm, text["tasks"], MIXTURES[:2], steps=2, repeats=2, rows=2)
    assert same(state(arm), before)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(each.grad is own for each, own in zip(arm.model.parameters(), gradient, strict=True))
    for _ in range(5):
        arm.train_step()
        twin.train_step()
    assert same(state(arm), state(twin))


def test_an_arm_is_left_as_it_was_when_something_raises(arm: Arm, text, monkeypatch) -> None:
    before, calls = state(arm), []
    original = Arm.train_step

    def breaking(self: Arm) -> None:
        original(self)
        calls.append(self.step)
        if len(calls) == 5:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(Arm, "train_step", breaking)
    with pytest.raises(RuntimeError, match="out of memory"):
        probe_arm(arm, text["tasks"], MIXTURES, steps=3)
    assert calls == [7, 8, 9, 7, 8]
    assert same(state(arm), before)


class Noisy:
    """A model with dropout that draws its data from the global generators, as many people's trainers do."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.seen: list[tuple[float, ...]] = []

    def train_step(self, mixture, step: int) -> None:
        self.model.train()
        rows = torch.randn(4, 3) + np.random.rand() + random.random()  # noqa: NPY002
        self.seen.append((step, *rows.flatten().tolist()))
        self.optimizer.zero_grad()
        weights = torch.from_numpy(mixture).float()
        (self.model(rows * weights) - rows.sum(1, keepdim=True)).square().mean().backward()
        self.optimizer.step()

    def evaluate(self):
        self.model.eval()
        noise = torch.rand(()).item()
        with torch.no_grad():
            return [self.model(torch.eye(3)).sum().item() ** 2 + noise, self.model(-torch.eye(3)).sum().item() ** 2]

    def probe(self, mixtures, **options) -> ProbeLabels:
        return probe([self.model, self.optimizer], self.train_step, self.evaluate, mixtures, **options)


def test_all_mixtures_meet_the_same_noise_and_repeats_other() -> None:
    trainer = Noisy()
    trainer.model[0].bias.grad = torch.full((8,), float("nan"))
    generators = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # noqa: NPY002
    labels = trainer.probe([*MIXTURES, MIXTURES[1]], steps=3, repeats=3)
    assert np.array_equal(labels.runs[:, 1], labels.runs[:, 4])
    assert len(np.unique(labels.runs[:, 0, 0])) == 3
    by_candidate = [trainer.seen[start : start + 3] for start in range(0, 45, 3)]
    assert [each[0] for each in by_candidate[0]] == [0, 1, 2]
    for repeat in range(3):
        assert all(each == by_candidate[5 * repeat] for each in by_candidate[5 * repeat : 5 * repeat + 5])
    assert by_candidate[0] != by_candidate[5]
    now = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # noqa: NPY002
    assert now == generators
    assert trainer.model.training
    assert trainer.model[0].bias.grad.isnan().all()
    assert trainer.model[2].bias.grad is None


def test_the_evaluations_own_noise_is_the_same_before_and_after() -> None:
    labels = probe([], lambda mixture, step: torch.rand(3), lambda: torch.rand(2), MIXTURES, steps=3)
    assert not labels.runs.any()
    assert labels.before.any()


def test_errors_are_of_the_mean_over_repeats_and_pairing_removes_what_is_shared() -> None:
    random_ = np.random.default_rng(0)
    truth = np.array([[1.0], [2.0], [4.0]])
    runs = truth + 5 * random_.normal(size=(400, 1, 1)) + 0.2 * random_.normal(size=(400, 3, 1))
    labels = ProbeLabels(MIXTURES[:3], runs, np.zeros((400, 1)), 1)
    assert labels.stderr == pytest.approx(np.full((3, 1), 5 / 20), rel=0.1)
    assert labels.paired_stderr == pytest.approx(np.full((3, 1), 0.2 * math.sqrt(2 / 3) / 20), rel=0.1)
    one = ProbeLabels(MIXTURES[:3], runs[:1], np.zeros((1, 1)), 1)
    assert np.isnan(one.stderr).all()
    assert np.isnan(one.paired_stderr).all()


def test_a_list_may_be_probed_in_parts_and_again() -> None:
    trainer = Noisy()
    whole = trainer.probe(MIXTURES, steps=2, repeats=2)
    parts = [trainer.probe(MIXTURES[:1], steps=2, repeats=2), trainer.probe(MIXTURES[1:], steps=2, repeats=2)]
    assert np.array_equal(np.concatenate([each.runs for each in parts], axis=1), whole.runs)
    assert not np.array_equal(trainer.probe(MIXTURES, steps=2, repeats=2, seed=1).runs, whole.runs)


def test_repeats_without_other_data_are_told() -> None:
    weight = torch.zeros(3)

    def train_step(mixture, step: int) -> None:
        weight.add_(torch.from_numpy(mixture).float())

    with pytest.warns(UserWarning, match="all repeats gave the same labels: draw data from"):
        labels = probe([weight], train_step, lambda: -weight, MIXTURES, steps=2, repeats=2)
    assert labels.labels == pytest.approx(2 * MIXTURES)
    assert np.array_equal(labels.before, np.zeros((2, 3)))

    shift = torch.zeros(())

    def prepare(mixture, repeat: int) -> None:
        mixture[:] = 0.0  # a copy: the caller's stays
        shift.fill_(float(repeat))

    labels = probe([weight, shift], train_step, lambda: -weight - shift, MIXTURES, steps=2, repeats=2, prepare=prepare)
    assert labels.runs[1] == pytest.approx(2 * MIXTURES + 1)
    assert (shift, weight.tolist()) == (0, [0, 0, 0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mixtures": [0.5, 0.5]}, ValueError, r"mixtures must have shape \[N, m\]"),
        ({"mixtures": np.empty((0, 2))}, ValueError, r"mixtures must have shape \[N, m\]"),
        ({"mixtures": "web"}, TypeError, "mixtures must hold numbers; got str"),
        (
            {"mixtures": [[0.5, 0.5], [0.5, 0.6]]},
            ValueError,
            "mixtures must .* sum to 1 within 0.01 in every row; got row 1",
        ),
        ({"mixtures": [[1.5, -0.5]]}, ValueError, "mixtures must be at least 0 .*; got row 0"),
        ({"steps": 0}, ValueError, "steps must be an int of at least 1; got 0"),
        ({"steps": 2.5}, ValueError, "steps must be an int of at least 1; got 2.5"),
        ({"repeats": 0}, ValueError, "repeats must be an int of at least 1"),
        ({"seed": -1}, ValueError, "seed must be an int of at least 0"),
        ({"owners": [1]}, TypeError, "an owner must be a module"),
        ({"evaluate": list}, ValueError, "evaluate must return the losses of one or more tasks; got 0 before training"),
        (
            {"evaluate": iter([[1.0], [1.0, 2.0]]).__next__},
            ValueError,
            "evaluate must return the losses of 1 tasks; got 2 after 1 steps on mixture 0",
        ),
        (
            {"evaluate": iter([[1.0], [1.0], [math.nan]]).__next__},
            FloatingPointError,
            r"evaluate must return finite losses; got \[nan\] after 1 steps on mixture 1",
        ),
    ],
)
def test_mistakes_are_told_and_leave_the_state(changes, error, message: str) -> None:
    weight = torch.zeros(2)
    arguments = {
        "owners": [weight],
        "train_step": lambda mixture, step: weight.add_(1),
        "evaluate": lambda: [1.0],
        "mixtures": [[0.5, 0.5], [1.0, 0.0]],
        "steps": 1,
        **changes,
    }
    with pytest.raises(error, match=message):
        probe(**arguments)
    assert weight.tolist() == [0, 0]
