"""DoGE (arXiv 2310.15393): a proxy run learns weights by gradient alignment, the main run uses their average."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from benchmarks.study import counting
from benchmarks.study.baselines.gradients import draw, gradient, mirror_step
from benchmarks.study.training import Method, Study, Trainee

__all__ = ["DoGE"]


class DoGE(Method):
    """Train a proxy on reweighted domain gradients and take the average of its weights.

    Each step of the proxy draws every domain equally, moves each weight by exp(rate * <its gradient, the target's>),
    and follows the domain gradients in these weights. The target is the equal mixture of all steered tasks, as in the
    paper's out-of-domain setting.
    """

    def __init__(self, study: Study) -> None:
        settings = dataclasses.replace(study.settings.proxy, seed=study.seed)
        domains, tasks = study.problem.domains, study.problem.steered
        rows = study.settings.doge_rows
        random = np.random.default_rng([study.seed, 3])
        arm = Trainee(settings, domains, study.uniform, study.settings.device)
        parameters = list(arm.model.parameters())
        sizes = [each.numel() for each in parameters]
        weights, total = study.uniform, np.zeros(len(domains))
        while arm.step < settings.steps:
            target = gradient(arm.model, torch.cat(draw(tasks.values(), rows, random)))
            gradients = torch.stack([gradient(arm.model, each) for each in draw(domains.values(), rows, random)])
            rate = study.settings.doge_rate * arm.learning_rate() / settings.learning_rate
            weights = mirror_step(weights, (gradients @ target).double().cpu().numpy(), rate)
            total += weights
            followed = torch.from_numpy(weights).to(gradients) @ gradients
            for parameter, part in zip(parameters, followed.split(sizes), strict=True):
                parameter.grad = part.view_as(parameter)
            arm.take_step()
        super().__init__(total / settings.steps)
        model = settings.model
        self.flops = float(
            settings.steps
            * (
                counting.training(model, (len(domains) + len(tasks)) * rows * model.length)
                + counting.inner_products(model, len(domains))
            )
        )
        self.log = [{"last": weights.tolist()}]
