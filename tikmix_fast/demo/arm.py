"""One training run of the demonstration: a model, its optimizer and its sampler."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from tikmix_fast.data.sampler import MixtureSampler
from tikmix_fast.demo.corpora import Sequences
from tikmix_fast.demo.gpt import GPT
from tikmix_fast.demo.settings import DemoSettings

__all__ = ["Arm"]


class Arm:
    """A model, its optimizer and its sampler, all from one seed.

    Parameters
    ----------
    settings : DemoSettings
    domains : dict of str to Sequences
        Training data; the sampler starts with equal weights.

    Attributes
    ----------
    step : int
        Number of optimizer steps so far.
    """

    def __init__(self, settings: DemoSettings, domains: Mapping[str, Sequences]) -> None:
        self.settings = settings
        self.step = 0
        self.model = GPT(settings.model, settings.seed)
        self.optimizer = self._make_optimizer()
        self._data: ConcatDataset[Tensor] = ConcatDataset(list(domains.values()))
        self._lengths = {name: len(text) for name, text in domains.items()}
        self.sampler = self._make_sampler()

    def branch(self) -> Arm:
        """Return an independent copy of this arm. Both draw the same data until one gets new weights."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model)
        twin.optimizer = twin._make_optimizer()
        # Without deepcopy both optimizers would share the moments: load_state_dict does not copy tensors.
        twin.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        twin.sampler = self._make_sampler()
        twin.sampler.load_state_dict(self.sampler.state_dict())
        return twin

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters and the optimizer's state by name, without copies."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"parameter/{name}"] = parameter
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state[parameter].items()}
        return tensors

    def counters(self) -> dict[str, Any]:
        """Return the rest of the state as plain JSON types."""
        # The learning rate of the last step: a measurement before the next step uses it as its unit.
        return {"step": self.step, "rate": self.optimizer.param_groups[0]["lr"], "sampler": self.sampler.state_dict()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Continue from what `tensors` and `counters` returned."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[f"parameter/{name}"])
            # Clones have torch's own alignment, on which the rounding of kernels may depend.
            self.optimizer.state[parameter] = {
                key: tensors[f"{key}/{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
            }
        for group in self.optimizer.param_groups:
            group["lr"] = counters["rate"]
        self.step = counters["step"]
        self.sampler.load_state_dict(counters["sampler"])

    @property
    def weights(self) -> dict[str, float]:
        """The current mixture, by domain."""
        return dict(zip(self._lengths, self.sampler.weights.tolist(), strict=True))

    @property
    def drawn(self) -> dict[str, int]:
        """Number of training sequences so far, by domain."""
        return dict(zip(self._lengths, self.sampler.counts.tolist(), strict=True))

    def train_step(self) -> None:
        """Take one optimizer step on the next sequences of the mixture."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        batch = torch.stack([self._data[index] for index in islice(self.sampler, self.settings.batch)])
        self.optimizer.zero_grad()
        self.model.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.step += 1

    def learning_rate(self) -> float:
        """Return the learning rate of the next step: a linear rise, then a cosine down to a tenth of the peak."""
        settings = self.settings
        if self.step < settings.warm_up:
            return settings.learning_rate * (self.step + 1) / settings.warm_up
        done = (self.step - settings.warm_up) / (settings.steps - settings.warm_up)
        return settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))

    def _make_optimizer(self) -> torch.optim.AdamW:
        settings = self.settings
        return torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def _make_sampler(self) -> MixtureSampler:
        uniform = dict.fromkeys(self._lengths, 1 / len(self._lengths))
        return MixtureSampler(self._lengths, uniform, seed=self.settings.seed)
