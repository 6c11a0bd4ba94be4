"""ODM (arXiv 2312.02406): a bandit whose arms are domains and whose reward is the training loss."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from benchmarks.study.training import Array, Method, Study, Trainee

__all__ = ["ODM", "explore"]

_SMOOTHING = 0.9


class ODM(Method):
    """Draw domains with a high training loss more often, with exploration that decays.

    The reward of a domain is an exponential average (0.9) of exp(loss), as in the authors' code. ODM knows no task and
    costs nothing beyond the training step.
    """

    def __init__(self, study: Study) -> None:
        super().__init__(study.uniform)
        self.rewards = np.zeros(len(study.uniform))
        self._every = study.settings.update_every
        self._warm_up = study.main.warm_up
        self._exploration = 1 / len(study.uniform)

    def observe(self, step: int, domains: NDArray[np.int64], losses: Array) -> None:
        """Average the reward of the domains in the batch, then choose the weights."""
        for domain in np.unique(domains):
            reward = math.exp(losses[domains == domain].mean())
            self.rewards[domain] = _SMOOTHING * self.rewards[domain] + (1 - _SMOOTHING) * reward
        self.weights, self._exploration = explore(self.rewards, self._exploration, step)

    def update(self, arm: Trainee) -> Array | None:
        """Return the chosen weights every ``update_every`` steps after the warm-up."""
        return None if arm.step < self._warm_up or arm.step % self._every else self.weights


def explore(rewards: Array, before: float, step: int) -> tuple[Array, float]:
    """Return the weights, softmax(before * rewards) above a decaying floor, and that floor: the next ``before``."""
    count = len(rewards)
    floor = min(1 / count, math.sqrt(math.log(count) / (count * step)))
    exponent = before * rewards
    chosen = np.exp(exponent - exponent.max())
    return np.asarray((1 - count * floor) * chosen / chosen.sum() + floor), floor
