"""One model in training on one mixture."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset

from tikmix_fast.data.corpora import Sequences
from tikmix_fast.data.sampler import MixtureSampler
from tikmix_fast.training.gpt import GPT
from tikmix_fast.training.settings import DemoSettings

__all__ = ["Arm"]


class Arm:
    """A model, its optimizer and its sampler, all started from one seed.

    Parameters
    ----------
    settings : DemoSettings
    domains : dict of str to Sequences
        What is trained on; it begins with equal weights.

    Attributes
    ----------
    step : int
        Optimizer steps done.
    drawn : dict of str to int
        Sequences trained on, by domain.
    """

    def __init__(self, settings: DemoSettings, domains: Mapping[str, Sequences]) -> None:
        self.settings = settings
        self.domains = domains
        self.model = GPT(settings.model, settings.seed)
        self.optimizer = self._adam()
        self.step = 0
        self._data: ConcatDataset[Tensor] = ConcatDataset(list(domains.values()))
        uniform = np.full(len(domains), 1 / len(domains))
        self.sampler = MixtureSampler([len(each) for each in domains.values()], uniform, seed=settings.seed)
        self._indices = iter(self.sampler)
        self._counts = np.zeros(len(domains), dtype=np.int64)

    def branch(self) -> Arm:
        """Return a second arm that goes on from here on its own, with the same data as long as the weights agree."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model)
        twin.optimizer = twin._adam()
        twin.optimizer.load_state_dict(self.optimizer.state_dict())
        twin.sampler = MixtureSampler(
            [len(each) for each in self.domains.values()], self.sampler.weights, seed=self.settings.seed
        )
        twin.sampler.load_state_dict(self.sampler.state_dict(consumed=self.step * self.settings.batch))
        twin._indices = iter(twin.sampler)
        twin._counts = self._counts.copy()
        return twin

    @property
    def drawn(self) -> dict[str, int]:
        return dict(zip(self.domains, self._counts.tolist(), strict=True))

    def set_weights(self, weights: NDArray[np.float64]) -> None:
        """Sample with ``weights``, float64 [m], from the next step on."""
        self.sampler.set_weights(weights, at=self.step * self.settings.batch)

    def train_step(self) -> None:
        """Take one optimizer step on the next sequences of the mixture."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad()
        self.model.loss(self._next_batch()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.step += 1

    def learning_rate(self) -> float:
        """Return the rate of the next step: a linear rise, then a cosine to a tenth of the peak."""
        settings = self.settings
        if self.step < settings.warm_up:
            return settings.learning_rate * (self.step + 1) / settings.warm_up
        done = (self.step - settings.warm_up) / max(1, settings.steps - settings.warm_up)
        return settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))

    def _adam(self) -> torch.optim.AdamW:
        settings = self.settings
        return torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def _next_batch(self) -> Tensor:
        indices = [next(self._indices) for _ in range(self.settings.batch)]
        domain = np.searchsorted(self._data.cumulative_sizes, indices, side="right")
        self._counts += np.bincount(domain, minlength=len(self.domains))
        return torch.stack([self._data[index] for index in indices])


def _forever(sampler: MixtureSampler) -> Iterator[int]:
    while True:
        yield from sampler
