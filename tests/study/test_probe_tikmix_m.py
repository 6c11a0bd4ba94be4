"""TiKMiX-M end to end on a small GPT: candidates, probe labels, surrogate, search, and the last word by real steps."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from benchmarks.study.probe_arm import probe_arm
from tikmix_fast.demo.arm import Arm
from tikmix_fast.demo.corpora import Corpora, Sequences
from tikmix_fast.demo.measuring import measure
from tikmix_fast.demo.settings import DemoSettings
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.mixture.direct.tikmix_d import tikmix_d
from tikmix_fast.mixture.result import MixtureResult
from tikmix_fast.mixture.schedule.dynamic import DynamicMixture
from tikmix_fast.mixture.surrogate.candidates import draw_mixtures
from tikmix_fast.mixture.surrogate.mixture_model import MixtureModel
from tikmix_fast.mixture.surrogate.tikmix_m import tikmix_m
from tikmix_fast.probes.probe import ProbeLabels


class BothSolvers:
    """TiKMiX-D proposes, TiKMiX-M searches around it on probe labels, and real steps decide between the two."""

    def __init__(self, arm: Arm, tasks: dict[str, Sequences]) -> None:
        self.arm, self.tasks = arm, tasks
        self.labelled: list[tuple[ProbeLabels, MixtureModel]] = []
        self.finals: list[ProbeLabels] = []

    def label(self, mixtures: np.ndarray) -> ProbeLabels:
        return probe_arm(self.arm, self.tasks, mixtures, steps=8)

    def __call__(self, matrix: InfluenceMatrix, prior: dict[str, float]) -> MixtureResult:
        direct = tikmix_d(matrix, prior)
        around = draw_mixtures(direct.weights, 23, "log_uniform", low=0.2, high=3.0)
        labelled = self.label(np.concatenate([direct.weights[None], around]))
        model = MixtureModel(kind="ridge").fit(
            labelled.mixtures, labelled.labels, domains=matrix.domains, tasks=matrix.tasks
        )
        searched = tikmix_m(model, direct, pareto=False, candidates=1000, top=32)
        self.labelled.append((labelled, model))
        self.finals.append(self.label(np.stack([direct.weights, searched.weights])))
        return (direct, searched)[int(self.finals[-1].labels.sum(axis=1).argmax())]


@pytest.fixture
def solvers(settings: DemoSettings, corpora: Corpora) -> tuple[BothSolvers, DynamicMixture]:
    length = settings.model.length
    domains = {name: Sequences(text, length) for name, text in corpora.domains.items()}
    tasks = {"prose": Sequences(corpora.tasks["prose"].measure, length)}
    solver = BothSolvers(Arm(settings, domains), tasks)
    schedule = DynamicMixture(domains, settings.steps, settings.stages, solver=solver)
    arm = solver.arm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while arm.step < settings.steps:
            if schedule.due(arm.step):
                random = np.random.default_rng([settings.seed, arm.step])
                step, drawn = arm.step, arm.drawn
                matrix = measure(arm.model, arm.optimizer, domains, tasks, settings, random)
                decision = schedule.update(arm.step, matrix)
                assert (arm.step, arm.drawn) == (step, drawn)  # probing is no training
                arm.sampler.set_weights(decision.weights)
            arm.train_step()
    return solver, schedule


def test_probe_labels_lead_the_search_to_what_helps(solvers: tuple[BothSolvers, DynamicMixture]) -> None:
    solver, schedule = solvers
    assert [each.step for each in schedule.history] == [8, 16]
    for (labelled, model), final, decision in zip(solver.labelled, solver.finals, schedule.history, strict=True):
        assert labelled.labels.shape == (24, 1)
        # The share of prose is what lowers the loss on prose, and the surrogate has learnt it.
        assert np.corrcoef(labelled.mixtures[:, 0], labelled.labels[:, 0])[0, 1] > 0.5
        direct, searched = final.mixtures
        assert model.predict(searched[None])[0, 0] >= model.predict(direct[None])[0, 0]
        assert searched[0] > direct[0]
        # The same mixture gets the same label, whatever is probed beside it.
        assert np.array_equal(final.labels[0], labelled.labels[0])
        best = final.mixtures[final.labels[:, 0].argmax()]
        assert list(decision.weights.values()) == pytest.approx(best.tolist(), abs=1e-12)
