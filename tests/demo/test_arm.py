"""One arm: its branch goes on exactly as it would have itself, its draws follow its weights."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tikmix_fast.demo.arm import Arm
from tikmix_fast.demo.corpora import Corpora, Sequences
from tikmix_fast.demo.settings import DemoSettings


@pytest.fixture
def arm(settings: DemoSettings, corpora: Corpora) -> Arm:
    return Arm(settings, {name: Sequences(text, settings.model.length) for name, text in corpora.domains.items()})


def test_a_branch_goes_on_as_its_trunk_would_and_leaves_it_alone(arm: Arm) -> None:
    for _ in range(5):
        arm.train_step()
    twin = arm.branch()
    frozen = {name: value.clone() for name, value in arm.model.state_dict().items()}
    for _ in range(5):
        twin.train_step()
    assert all(torch.equal(value, frozen[name]) for name, value in arm.model.state_dict().items())
    for _ in range(5):
        arm.train_step()
    assert (arm.step, arm.drawn) == (twin.step, twin.drawn)
    assert all(torch.equal(value, twin.model.state_dict()[name]) for name, value in arm.model.state_dict().items())


def test_draws_follow_the_weights_from_the_next_step_on(arm: Arm) -> None:
    for _ in range(6):
        arm.train_step()
    assert arm.drawn == {"prose": 8, "code": 8, "noise": 8}
    arm.sampler.set_weights({"prose": 0.75, "code": 0.25, "noise": 0.0})
    assert arm.weights == {"prose": 0.75, "code": 0.25, "noise": 0.0}
    for _ in range(6):
        arm.train_step()
    assert arm.drawn == {"prose": 26, "code": 14, "noise": 8}


def test_the_rate_rises_then_falls_to_a_tenth(arm: Arm) -> None:
    rates = []
    for arm.step in range(25):
        rates.append(arm.learning_rate())
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert max(rates) == rates[4] == pytest.approx(0.01)
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert rates[24] == pytest.approx(0.001)
