"""Gradients as vectors, for the baselines that align them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from tikmix_fast.demo.corpora import Sequences
from tikmix_fast.demo.gpt import GPT

__all__ = ["draw", "gradient", "mirror_step"]


def draw(texts: Iterable[Sequences], rows: int, random: np.random.Generator) -> list[Tensor]:
    """Draw ``rows`` sequences of every text."""
    return [text.all()[torch.from_numpy(random.choice(len(text), rows))] for text in texts]


def gradient(model: GPT, sequences: Tensor) -> Tensor:
    """Return the gradient of the mean loss as one vector."""
    gradients = torch.autograd.grad(model.loss(sequences), list(model.parameters()))
    return torch.cat([each.flatten() for each in gradients])


def mirror_step(weights: np.ndarray, gain: np.ndarray, rate: float) -> np.ndarray:
    """Return the mixture in proportion to ``weights * exp(rate * gain)``."""
    exponent = rate * gain
    moved = weights * np.exp(exponent - exponent.max())
    return np.asarray(moved / moved.sum())
