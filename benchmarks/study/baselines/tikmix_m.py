"""TiKMiX-M in stages: label mixtures around TiKMiX-D's answer, fit a surrogate, search it."""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np

from benchmarks.study import counting
from benchmarks.study.baselines.tikmix_d import TikmixD
from benchmarks.study.probe_arm import probe_arm
from benchmarks.study.training import Array, Study, Trainee
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.mixture.result import MixtureResult
from tikmix_fast.mixture.surrogate.candidates import draw_mixtures
from tikmix_fast.mixture.surrogate.labels import linear_labels
from tikmix_fast.mixture.surrogate.mixture_model import MixtureModel
from tikmix_fast.mixture.surrogate.tikmix_m import tikmix_m

__all__ = ["TikmixM"]


class TikmixM(TikmixD):
    """Search for a better mixture than TiKMiX-D's, between half and twice its weights.

    The score is the paper's: the sum over tasks of the predicted label over its spread, with no task worse than under
    TiKMiX-D. Labels are what TiKMiX-D assumes (``"linear"``) or the effect of some real steps (``"probe"``). With
    probe labels, real steps on other data decide between the new mixture and TiKMiX-D's.
    """

    def __init__(self, study: Study, labels: Literal["linear", "probe"]) -> None:
        super().__init__(study)
        self._labels = labels

    def solve(self, matrix: InfluenceMatrix, arm: Trainee) -> MixtureResult:
        """Return TiKMiX-M's answer, or TiKMiX-D's if that is better."""
        direct = super().solve(matrix, arm)
        settings, problem = self._study.settings, self._study.problem
        probing = self._labels == "probe"
        count = settings.probe_candidates if probing else settings.candidates
        around = draw_mixtures(direct.weights, count - 1, "log_uniform", seed=int(self._random.integers(2**31)))
        mixtures = np.concatenate([direct.weights[None], around])
        labels = self._probe(arm, mixtures)[0] if probing else linear_labels(matrix, mixtures)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the log holds them
            model = MixtureModel().fit(mixtures, labels, domains=tuple(problem.domains), tasks=tuple(problem.steered))
            searched = tikmix_m(model, direct, prior=direct.weights, floor=self._study.main.floor)
        self.log.append(
            {
                "step": arm.step,
                "tikmix-d": direct.weights.tolist(),
                "tikmix-m": searched.weights.tolist(),
                "message": searched.message,
                "kinds": list(model.kinds),
                "spearman": {kind: np.nan_to_num(each.spearman).tolist() for kind, each in model.scores.items()},
            }
        )
        if not probing:
            return searched
        both = self._probe(arm, np.stack([direct.weights, searched.weights]), repeats=2)[-1]
        self.log[-1]["tried again"] = both.tolist()
        return (direct, searched)[int((both / labels.std(0)).sum(1).argmax())]

    def _probe(self, arm: Trainee, mixtures: Array, repeats: int = 1) -> Array:
        """Return the decrease of each task's loss [R, N, n] by real steps; the last repeat has its own data."""
        settings, tasks, main = self._study.settings, self._study.problem.steered, self._study.main
        labels = probe_arm(
            arm, tasks, mixtures, steps=settings.probe_steps, repeats=repeats, rows=settings.main.curve_rows
        )
        rows = sum(min(main.curve_rows, len(text)) for text in tasks.values())
        trained = len(mixtures) * settings.probe_steps * main.batch
        self.flops += repeats * (
            counting.training(main.model, trained * main.model.length)
            + counting.forward(main.model, (len(mixtures) + 1) * rows * main.model.length)
        )
        return labels.runs
