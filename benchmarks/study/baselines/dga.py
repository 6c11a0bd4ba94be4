"""DGA (arXiv 2410.02498): online mirror steps towards domains whose gradient aligns with the target's."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.study import counting
from benchmarks.study.baselines.gradients import draw, gradient, mirror_step
from benchmarks.study.training import Array, Method, Study, Trainee

__all__ = ["DGA"]


class DGA(Method):
    """Every few steps multiply each weight by exp(rate * <domain gradient, target gradient>), smoothed.

    The target is the equal mixture of all steered tasks. Gradients are raw, as published, on fresh sequences.
    """

    def __init__(self, study: Study) -> None:
        super().__init__(study.uniform)
        self._settings = study.settings
        self._domains = study.problem.domains.values()
        self._tasks = study.problem.steered.values()
        self._moved = study.uniform
        self._random = np.random.default_rng([study.seed, 2])

    def update(self, arm: Trainee) -> Array | None:
        """Move towards aligned domains, every ``update_every`` steps after the warm-up."""
        if arm.step < arm.settings.warm_up or arm.step % self._settings.update_every:
            return None
        rows = self._settings.dga_rows
        target = gradient(arm.model, torch.cat(draw(self._tasks, rows, self._random)))
        aligned = [float(gradient(arm.model, each) @ target) for each in draw(self._domains, rows, self._random)]
        self._moved = mirror_step(self._moved, np.array(aligned), self._settings.dga_rate)
        keep = self._settings.dga_smoothing
        self.weights = keep * self.weights + (1 - keep) * self._moved
        model = arm.settings.model
        self.flops += counting.training(model, (len(self._domains) + len(self._tasks)) * rows * model.length)
        self.flops += counting.inner_products(model, len(self._domains))
        return self.weights
