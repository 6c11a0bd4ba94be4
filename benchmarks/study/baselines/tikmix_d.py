"""TiKMiX-D in stages: measure Group Influence at each boundary and solve for the mixture."""

from __future__ import annotations

import warnings

import numpy as np

from benchmarks.study import counting
from benchmarks.study.training import Array, Method, Study, Trainee
from tikmix_fast.demo.measuring import measure, rows_measured
from tikmix_fast.matrix.influence_matrix import InfluenceMatrix
from tikmix_fast.mixture.direct.tikmix_d import tikmix_d
from tikmix_fast.mixture.result import MixtureResult

__all__ = ["TikmixD", "measuring_flops"]


class TikmixD(Method):
    """Train the first stage on the uniform mixture, then follow the influence of each boundary."""

    def __init__(self, study: Study) -> None:
        super().__init__(study.uniform)
        self._study = study
        self._random = np.random.default_rng([study.seed, 1])

    def update(self, arm: Trainee) -> Array | None:
        """Measure and solve at a stage boundary."""
        settings, problem = self._study.main, self._study.problem
        if arm.step not in settings.boundaries:
            return None
        matrix = measure(arm.model, arm.optimizer, problem.domains, problem.steered, settings, self._random)
        self.flops += measuring_flops(self._study)
        return self.keep(arm.step, matrix, self.solve(matrix, arm))

    def keep(self, step: int, matrix: InfluenceMatrix, solution: MixtureResult) -> Array:
        """Note a solution and return its weights."""
        values, errors = (
            [[None if np.isnan(each) else each for each in row] for row in table.tolist()]
            for table in (matrix.values, matrix.stderr)
        )
        message = "; ".join([solution.message, *solution.warnings])
        self.log.append({"step": step, "influence": values, "stderr": errors, "message": message})
        return solution.weights

    def solve(self, matrix: InfluenceMatrix, arm: Trainee) -> MixtureResult:
        """Return TiKMiX-D's answer with the study's settings."""
        settings = self._study.main
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the result holds them
            return tikmix_d(
                matrix, arm.weights, uniformity=settings.uniformity, influence=settings.influence,
                diversity=settings.diversity, floor=settings.floor, smoothing=settings.smoothing,
            )  # fmt: skip


def measuring_flops(study: Study) -> float:
    """Return the operations of one measurement: its passes and all inner products, per split of each task."""
    settings, domains, tasks = study.main, len(study.problem.domains), len(study.problem.steered)
    tokens = rows_measured(settings, domains, tasks) * settings.model.length
    return float(
        counting.training(settings.model, tokens)
        + counting.inner_products(settings.model, settings.domain_batches * domains * tasks * settings.task_splits)
    )
