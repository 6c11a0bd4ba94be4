"""Additivity: S w against the influence of sampled mixtures w."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import torch

from benchmarks.study.prediction.subject import Subject, influence, interleaved
from tikmix_fast import Adam, MixtureSampler

__all__ = ["additivity"]


def additivity(subject: Subject) -> dict[str, Any]:
    """Measure S, the influence of sampled mixtures, and the sampling noise of both.

    Both use the same validation sets, which are fixed, and independent sequences of the domains. Every mixture is one
    column of the engine.
    """
    settings, arm = subject.settings, subject.arm
    names = list(subject.domains)
    samples = np.random.default_rng([subject.seed, 6])
    batches = interleaved(subject.domains, settings.additivity_rows, settings.batch_rows, samples)
    # Without a floor, bytes that the run never trained on (P = 1 / eps) dominate, and no sample of this size suffices.
    matrix = influence(arm.model, arm.optimizer, subject, Adam(floor=1.0), batches, names)
    weights = np.random.default_rng([subject.seed, 8]).dirichlet(np.ones(len(names)), settings.mixtures)
    lengths = {name: len(text) for name, text in subject.domains.items()}
    everything = torch.cat([text.all() for text in subject.domains.values()])
    order = []
    for number, mixture in enumerate(weights):
        weights_by_name = dict(zip(names, mixture.tolist(), strict=True))
        sampler = MixtureSampler(lengths, weights_by_name, seed=1000 * subject.seed + number)  # draws as training does
        order.append(list(islice(sampler, settings.mixture_rows)))
    chosen = torch.tensor(order)  # [mixtures, rows]
    ids = torch.arange(settings.mixtures)
    sampled = influence(
        arm.model,
        arm.optimizer,
        subject,
        Adam(floor=1.0),
        ((everything[column], ids) for column in chosen.T),
        [f"mixture {number}" for number in range(settings.mixtures)],
    )
    predicted = matrix.values @ weights.T
    # Sampling noise of both sides lowers r even for a perfect prediction. The mixtures share the noise of S w.
    error = matrix.stderr_domain**2
    centred = weights - weights.mean(0)
    per_sequence = error * settings.additivity_rows / settings.mixture_rows
    noise_predicted = (error[:, None, :] * centred[None] ** 2).sum(2).mean(1)
    return {
        "tasks": list(subject.tasks),
        "predicted": predicted.tolist(),
        "measured": sampled.values.tolist(),
        "noise_predicted": noise_predicted.tolist(),
        "noise_measured": (per_sequence @ weights.T).mean(1).tolist(),
        "tokens_per_mixture": float(sampled.tokens[0]),
        "tokens_per_domain": float(matrix.tokens[0]),
    }
