"""A GPT of any vocabulary, and its mean gradients by float64 autograd: the truth that the engine is compared with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tikmix_fast.demo.gpt import GPT, GPTSettings
from tikmix_fast.testing import WorstCell, influence_error

__all__ = ["Truth", "make_gpt", "mean_gradients", "numbered", "summed_loss"]


def make_gpt(layers: int, heads: int, width: int, length: int, vocabulary: int, seed: int = 0) -> GPT:
    """Return the demonstration's model with another vocabulary."""
    model = GPT(GPTSettings(layers=layers, heads=heads, width=width, length=length), seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model.bytes = nn.Embedding(vocabulary, width)
        model.head = nn.Linear(width, vocabulary, bias=False)
        for module in (model.bytes, model.head):
            nn.init.normal_(module.weight, std=0.02)
    return model


def summed_loss(model: nn.Module, batch: Tensor, autocast: bool = False) -> Tensor:
    """Return the cross-entropy of ``batch`` [B, S + 1], summed over its target tokens."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")


def mean_gradients(model: nn.Module, groups: Sequence[Sequence[Tensor]], autocast: bool = False) -> Tensor:
    """Return the mean gradient per target token of every group of batches, [groups, all parameters]."""
    parameters = list(model.parameters())
    rows = []
    for batches in groups:
        total = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype)
        for batch in batches:
            gradients = torch.autograd.grad(summed_loss(model, batch, autocast), parameters)
            total += torch.cat([each.flatten() for each in gradients])
        rows.append(total / sum(batch[:, 1:].numel() for batch in batches))
    return torch.stack(rows)


class Truth(NamedTuple):
    """Mean gradients of tasks [n, P] and domains [m, P], by float64 autograd."""

    tasks: Tensor
    domains: Tensor

    @classmethod
    def of(cls, model: GPT, tasks: Sequence[Sequence[Tensor]], domains: Sequence[Sequence[Tensor]]) -> Truth:
        """Compute them with a float64 copy of the model."""
        wide = copy.deepcopy(model).double()
        return cls(mean_gradients(wide, tasks), mean_gradients(wide, domains))

    def error(self, values: Tensor) -> WorstCell:
        """Measure the error of an influence matrix [n, m]; see `influence_error`."""
        return influence_error(values, self.tasks @ self.domains.T, self.tasks[..., None], self.domains[..., None])


def numbered(noun: str, count: int) -> list[str]:
    """Return names such as "task 0", "task 1"."""
    return [f"{noun} {index}" for index in range(count)]
