"""The schedule beside real training: it decides what the demonstration decides, and resumes with the arm it drives."""

from __future__ import annotations

import json
import warnings

import numpy as np
import torch

from tikmix_fast.demo.arm import Arm
from tikmix_fast.demo.corpora import Corpora, Sequences
from tikmix_fast.demo.demonstration import demonstrate
from tikmix_fast.demo.measuring import measure
from tikmix_fast.demo.settings import DemoSettings
from tikmix_fast.mixture.schedule.dynamic import DynamicMixture

OPTIONS = ("uniformity", "influence", "diversity", "floor", "smoothing")


def make_schedule(settings: DemoSettings, domains, **more) -> DynamicMixture:
    options = {name: getattr(settings, name) for name in OPTIONS}
    return DynamicMixture(domains, settings.steps, settings.stages, options=options, **more)


def test_it_decides_bit_by_bit_what_the_demonstration_does(settings: DemoSettings, corpora: Corpora) -> None:
    result = demonstrate(settings, corpora)
    schedule = make_schedule(settings, corpora.domains)
    assert schedule.weights == result.tikmix.weights[0][1]
    for boundary in result.boundaries:
        assert schedule.due(boundary.step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decision = schedule.update(boundary.step, boundary.matrix)
        assert decision.weights == boundary.weights
    assert not any(schedule.due(step) for step in range(boundary.step, settings.steps))


def test_a_run_resumed_between_boundaries_is_the_uninterrupted_one(settings: DemoSettings, corpora: Corpora) -> None:
    length = settings.model.length
    domains = {name: Sequences(text, length) for name, text in corpora.domains.items()}
    tasks = {name: Sequences(task.measure, length) for name, task in corpora.tasks.items()}

    def train(arm: Arm, schedule: DynamicMixture, until: int) -> None:
        while arm.step < until:
            if schedule.due(arm.step):
                random = np.random.default_rng([settings.seed, arm.step])
                matrix = measure(arm.model, arm.optimizer, domains, tasks, settings, random)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    decision = schedule.update(arm.step, matrix)
                assert matrix.record is not None
                assert not np.isnan(decision.reliability).any()
                assert np.isfinite(decision.gain.excess)
                arm.sampler.set_weights(decision.weights)
            arm.train_step()

    whole, whole_schedule = Arm(settings, domains), make_schedule(settings, domains, minimum_gain=0.5)
    train(whole, whole_schedule, settings.steps)
    first, first_schedule = Arm(settings, domains), make_schedule(settings, domains, minimum_gain=0.5)
    train(first, first_schedule, 12)
    again = make_schedule(settings, domains, minimum_gain=0.5)
    again.load_state_dict(json.loads(json.dumps(first_schedule.state_dict())))
    train(first, again, settings.steps)
    assert again.state_dict() == whole_schedule.state_dict()
    assert [each.step for each in again.history] == [8, 16]
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), whole.model.parameters(), strict=True))
