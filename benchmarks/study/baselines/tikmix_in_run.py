"""TiKMiX-D in-run: influence from the training steps themselves, with fresh task gradients at some of them."""

from __future__ import annotations

import numpy as np

from benchmarks.study import counting
from benchmarks.study.baselines.tikmix_d import TikmixD
from benchmarks.study.training import Around, Array, Study, Trainee
from tikmix_fast.influence.engine import InfluenceEngine
from tikmix_fast.influence.in_run.run import InRun

__all__ = ["TikmixInRun"]


class TikmixInRun(TikmixD):
    """Follow TiKMiX-D's answer to the average influence of measured steps, with small and frequent changes.

    The domain side of a measured step is its ordinary training batch, so only the tasks' passes and the inner products
    cost anything.
    """

    def __init__(self, study: Study) -> None:
        super().__init__(study)
        self._run: InRun | None = None

    def update(self, arm: Trainee) -> Array | None:
        """Solve every ``in_run_change`` steps."""
        if self._run is None:
            self._run = self._begin(arm)
        if not arm.step or arm.step % self._study.settings.in_run_change:
            return None
        matrix = self._run.matrix()
        return self.keep(arm.step, matrix, self.solve(matrix, arm))

    def around(self, arm: Trainee) -> Around:
        """Measure the next step if it is a measured one."""
        assert self._run is not None
        return self._run.micro_batch

    def observe(self, step: int, domains: np.ndarray, losses: Array) -> None:
        """Tell the measurement that the optimizer has stepped."""
        assert self._run is not None
        self._run.step()

    def _begin(self, arm: Trainee) -> InRun:
        settings, main, tasks = self._study.settings, self._study.main, self._study.problem.steered
        splits = min(main.task_splits, settings.in_run_rows)
        engine = InfluenceEngine(
            arm.model, list(self._study.problem.domains), list(tasks), main.preconditioner, arm.optimizer,
            task_splits=splits,
        )  # fmt: skip

        def measure_tasks(step: int) -> None:
            for name, text in tasks.items():
                rows = self._random.choice(len(text), settings.in_run_rows, replace=False)
                for part in np.array_split(rows, splits):
                    with engine.task(name):
                        arm.model.loss(text.all()[part]).backward()
            self.flops += counting.training(main.model, len(tasks) * settings.in_run_rows * main.model.length)
            self.flops += counting.inner_products(main.model, len(self._study.problem.domains) * len(tasks) * splits)

        return engine.in_run(settings.in_run_every, measure_tasks, settings.in_run_time, near_every=0)
